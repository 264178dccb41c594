"""What a policy scores, on one window or on several as if they were one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from morphserve.tools.sim import Simulated
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.workload import Slo


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over a window, so that windows add up: rates are over all requests sent and all tokens generated."""

    requests: int  # sent
    late: int  # of them, broke the promise; refused and unfinished ones count
    tokens: int  # generated
    nats: float  # expected KL, summed over the tokens
    transitions: int
    preemptions: int

    @property
    def violations(self) -> float:
        """Late requests as a share of those sent."""
        return self.late / self.requests

    @property
    def cost(self) -> float:
        """Expected KL, nats per token."""
        return self.nats / self.tokens if self.tokens else 0.0

    def no_worse_than(self, other: Score) -> bool:
        """Return whether it has no more violations at no more cost."""
        return self.violations <= other.violations and self.cost <= other.cost

    def dominates(self, other: Score) -> bool:
        """Return whether it is no worse in either, better in one."""
        return self.no_worse_than(other) and not other.no_worse_than(self)

    def document(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "violation_rate": self.violations,
            "expected_kl_per_token": self.cost,
            "requests": self.requests,
            "late": self.late,
            "transitions": self.transitions,
            "preemptions": self.preemptions,
        }


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one policy on all windows; rates are those of a single long run."""

    dev: tuple[Score, ...]  # one a window
    held_out: tuple[Score, ...]

    @property
    def on_dev(self) -> Score:
        """All dev windows together."""
        return total(self.dev)

    @property
    def on_held_out(self) -> Score | None:
        """All held-out windows together, if there are any."""
        return total(self.held_out) if self.held_out else None


def total(scores: Iterable[Score]) -> Score:
    """Add up all windows as one run."""
    parts = list(scores)
    return Score(
        sum(s.requests for s in parts),
        sum(s.late for s in parts),
        sum(s.tokens for s in parts),
        sum(s.nats for s in parts),
        sum(s.transitions for s in parts),
        sum(s.preemptions for s in parts),
    )


def score_of(simulated: Simulated, slo: Slo) -> Score:
    """Score one simulated window.

    Raises:
        TuningError: a level was served at whose quality cost nobody measured.
    """
    requests = len(simulated.workload.requests)
    tokens = sum(simulated.tokens_by_level.values())
    kl = simulated.expected_kl_per_token
    if kl is None and tokens:
        levels = ", ".join(level for level, count in simulated.tokens_by_level.items() if count)
        raise TuningError(
            f"tokens were generated at levels {levels}, and not all of these have a measured quality cost: there is "
            "nothing to weigh violations against. Set ladder.expected_kl in --config (`morphserve measure-kl`), or "
            "take a profile's ladder."
        )
    return Score(
        requests=requests,
        late=round(simulated.violation_rate(slo) * requests),
        tokens=tokens,
        nats=(kl or 0.0) * tokens,
        transitions=simulated.transitions,
        preemptions=simulated.preemptions,
    )
