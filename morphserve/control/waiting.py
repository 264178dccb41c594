"""The waiting queue in a few figures: what a policy predicts from, whatever the queue's length."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from itertools import pairwise

from policies import Cohort

_SPAN_S = 0.1  # requests that came within it count as one
_MAX_COHORTS = 24


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits that a request brought along; None = what the policy promises everyone."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def stricter(self, other: RequestLimits) -> RequestLimits:
        """Return the lower of each; a limit of one's own before none."""
        return RequestLimits(_lower(self.ttft_s, other.ttft_s), _lower(self.tpot_s, other.tpot_s))


NO_LIMITS = RequestLimits()


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request as the waiting queue sees it."""

    request_id: str
    num_tokens: int  # to compute before its next token
    limits: RequestLimits = NO_LIMITS
    priority: int = 0  # 0 for all where the scheduler serves first come, first served
    has_token: bool = False  # it was preempted after its first token


@dataclass(slots=True, eq=False)
class _Group:
    """A cohort that still changes."""

    priority: int
    has_token: bool
    limits: RequestLimits
    came_s: float  # arrival of its first request ever: its place in the queue
    first_s: float  # of those that are still there
    last_s: float
    num_requests: int = 0
    num_tokens: int = 0
    into: _Group | None = None  # the neighbour it was merged into

    @property
    def place(self) -> tuple[int, bool, float]:
        """The order of service: preempted ones are served before those that never ran."""
        return (self.priority, not self.has_token, self.came_s)

    @property
    def root(self) -> _Group:
        """The group that it has become a part of, itself perhaps."""
        group = self
        while group.into is not None:
            group = group.into
        return group

    def alike(self, other: _Group) -> bool:
        return (self.priority, self.has_token, self.limits) == (other.priority, other.has_token, other.limits)

    def frozen(self) -> Cohort:
        return Cohort(
            self.num_requests,
            self.num_tokens,
            self.first_s,
            self.last_s,
            self.limits.ttft_s,
            self.limits.tpot_s,
            self.has_token,
        )


class WaitingBook:
    """The requests that wait, as at most `_MAX_COHORTS` cohorts in the order of service. Constant cost per event."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []  # ordered by _place
        # Request id |-> the group it came into, its tokens, its arrival.
        self._members: dict[str, tuple[_Group, int, float]] = {}
        self._frozen: tuple[Cohort, ...] | None = ()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, request: WaitingRequest, arrival_s: float) -> None:
        """Add a request that begins to wait."""
        self.remove(request.request_id)
        self._frozen = None
        new = _Group(request.priority, request.has_token, request.limits, arrival_s, arrival_s, arrival_s)
        group = self._home(new)
        group.num_requests += 1
        group.num_tokens += request.num_tokens
        group.first_s = min(group.first_s, arrival_s)
        group.last_s = max(group.last_s, arrival_s)
        self._members[request.request_id] = (group, request.num_tokens, arrival_s)

    def serve(self, request_id: str) -> None:
        """Drop a request that was scheduled, as were those of its cohort that came before. Unknown ids are ignored."""
        member = self._members.get(request_id)
        if member is None:
            return
        self.remove(request_id)
        group = member[0].root
        group.first_s = max(group.first_s, min(member[2], group.last_s))

    def remove(self, request_id: str) -> None:
        """Drop a request that waits no longer. Unknown ids are ignored."""
        member = self._members.pop(request_id, None)
        if member is None:
            return
        self._frozen = None
        group = member[0].root
        group.num_requests -= 1
        group.num_tokens -= member[1]
        if group.num_requests == 0:
            self._groups.remove(group)

    def cohorts(self) -> tuple[Cohort, ...]:
        """Return the cohorts, next one to be served first."""
        if self._frozen is None:
            self._frozen = tuple(group.frozen() for group in self._groups)
        return self._frozen

    def _home(self, new: _Group) -> _Group:
        """Return the group for a request like `new`: one that is there, or `new` itself."""
        groups = self._groups
        at = bisect(groups, new.place, key=_place)
        for before in reversed(groups[:at]):  # others that came meanwhile may stand between
            is_near = new.first_s - before.came_s <= _SPAN_S or new.has_token
            if is_near and before.alike(new):
                return before
            if not is_near:
                break
        groups.insert(at, new)
        if len(groups) > _MAX_COHORTS:
            self._merge_closest()
        return new.root

    def _merge_closest(self) -> None:
        """Join the two groups that differ least: alike, if there are such, and else neighbours."""
        groups = self._groups
        pairs = []
        for i, a in enumerate(groups):
            j = next((j for j in range(i + 1, len(groups)) if a.alike(groups[j])), None)
            if j is not None:
                pairs.append((groups[j].last_s - a.first_s, i, j))
        _, i, j = min(pairs or [(b.last_s - a.first_s, i, i + 1) for i, (a, b) in enumerate(pairwise(groups))])
        kept, gone = groups[i], groups.pop(j)
        if not kept.alike(gone):  # more classes of requests than cohorts: the stricter limits count for both
            kept.limits = kept.limits.stricter(gone.limits)
            kept.has_token = kept.has_token and gone.has_token
        kept.num_requests += gone.num_requests
        kept.num_tokens += gone.num_tokens
        kept.last_s = max(kept.last_s, gone.last_s)
        gone.into = kept


def _place(group: _Group) -> tuple[int, bool, float]:
    return group.place


def _lower(a: float | None, b: float | None) -> float | None:
    known = [limit for limit in (a, b) if limit is not None]
    return min(known, default=None)
