"""All that makes a policy beside the ladder: compared when settings change, written down so that a log replays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from policies.build import build_policy
from policies.config import PolicyConfig, SloConfig, StaticConfig, ThresholdConfig
from policies.step_times import StepTimes, parse_step_times
from policies.types import EngineLimits, Ladder, Policy

_SECTION: TypeAdapter[StaticConfig | ThresholdConfig | SloConfig] = TypeAdapter(PolicyConfig)


@dataclass(frozen=True, slots=True)
class PolicySetup:
    """Equal setups on one ladder make policies that answer alike."""

    section: StaticConfig | ThresholdConfig | SloConfig
    times: StepTimes | None = None  # None where the kind does not predict: then their file may change as it likes
    limits: EngineLimits | None = None

    def build(self, ladder: Ladder) -> Policy:
        """A policy that has seen nothing yet.

        Raises:
            ValueError: see `build_policy`.
        """
        return build_policy(self.section, ladder, self.times, self.limits)

    def document(self) -> dict[str, Any]:
        """Plain values for JSON, every float exact."""
        return {
            "policy": self.section.model_dump(mode="json"),
            "step_times": None if self.times is None else self.times.document(),
            "limits": None if self.limits is None else asdict(self.limits),
        }

    @classmethod
    def from_document(cls, raw: Mapping[str, Any]) -> PolicySetup:
        """What `document` wrote.

        Raises:
            ValueError: it did not, or another version did.
        """
        try:
            times, limits = raw["step_times"], raw["limits"]
            return cls(
                _SECTION.validate_python(raw["policy"]),
                None if times is None else parse_step_times(times, "step times"),
                None if limits is None else EngineLimits(**limits),
            )
        except (KeyError, TypeError) as e:
            raise ValueError(f"no policy's setup: {type(e).__name__} {e}") from e
