"""All that makes a policy beside the ladder: compared when settings change, written down so that a log replays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256

from pydantic import TypeAdapter

from policies.build import build_policy
from policies.config import PolicyConfig
from policies.step_times import StepTimes
from policies.types import EngineLimits, Ladder, Policy


@dataclass(frozen=True, slots=True)
class PolicySetup:
    """All that makes a policy beside the ladder; equal ones answer alike. pydantic writes it into a log and back."""

    section: PolicyConfig
    times: StepTimes | None = None  # None where the kind does not predict: then their file may change as it likes
    limits: EngineLimits | None = None

    def inherits(self, last: PolicySetup) -> bool:
        """Return whether the policy goes on from what another one has seen, see `succeed`."""
        have_floors = self.section.floors.are_allowed and last.section.floors.are_allowed
        return have_floors or self.section.kind == last.section.kind == "slo"

    @property
    def digest(self) -> str:
        """Eight digits by which replicas are seen to serve the same, and nobody what."""
        values = TypeAdapter(PolicySetup).dump_python(self, mode="json")
        return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def build(self, ladder: Ladder) -> Policy:
        """Build a policy that has seen nothing yet.

        Raises:
            ValueError: see `build_policy`.
        """
        return build_policy(self.section, ladder, self.times, self.limits)
