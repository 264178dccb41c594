"""What requests are promised: everyone by the policy, one by a limit of its own, as far as the operator lets it."""

from __future__ import annotations

from dataclasses import dataclass

from policies.config import PolicyConfig, SloConfig

_LEAST_SHARE = 0.25  # of what everyone is promised: the floor where the operator names none


@dataclass(frozen=True, slots=True)
class Promise:
    """Everyone's limits, and what becomes of a request's own."""

    ttft_s: float | None = None  # None = nothing is promised
    tpot_s: float | None = None
    min_ttft_s: float = 0.0  # a request that asks for less is promised what everyone is
    min_tpot_s: float = 0.0
    heeds_requests: bool = True  # False = what they bring counts for nothing

    def own_ttft_s(self, asked_s: float | None) -> float | None:
        """Return the limit that a request has of its own; None = everyone's."""
        return self._own(asked_s, self.min_ttft_s)

    def own_tpot_s(self, asked_s: float | None) -> float | None:
        """Return the limit that a request has of its own; None = everyone's."""
        return self._own(asked_s, self.min_tpot_s)

    def _own(self, asked_s: float | None, floor_s: float) -> float | None:
        # Not raised to the floor: what nobody can keep would become what just one level keeps.
        return asked_s if asked_s is not None and self.heeds_requests and asked_s >= floor_s else None


def promise_of(section: PolicyConfig) -> Promise:
    """Return what a policy promises: nothing, where its kind knows no limits."""
    if not isinstance(section, SloConfig):
        return Promise()
    return Promise(
        section.ttft_s,
        section.tpot_s,
        _LEAST_SHARE * section.ttft_s if section.min_ttft_s is None else section.min_ttft_s,
        _LEAST_SHARE * section.tpot_s if section.min_tpot_s is None else section.min_tpot_s,
        section.request_limits,
    )
