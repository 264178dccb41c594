"""The waiting queue, and the limits of who runs, in a few figures: what a policy predicts from, whatever the length.

Clients choose the limits, so limits are told apart by octaves only: how many figures there are is not theirs to choose,
and nobody is judged by a limit that is twice as strict as his own.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import frexp

from policies import Cohort, OwnLimit

_SPAN_S = 0.1  # requests that came within it count as one
_MAX_COHORTS = 24  # but for limits of other octaves: with all of them there are 32
_TTFT_OCTAVES = range(-7, 8)  # from 8 ms to 256 s: what is stricter, or looser, counts as that
_TPOT_OCTAVES = range(-11, 4)  # from 0.5 ms to 16 s


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits that a request brought along; None = what the policy promises everyone."""

    ttft_s: float | None = None
    tpot_s: float | None = None


NO_LIMITS = RequestLimits()


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request as the waiting queue sees it."""

    request_id: str
    num_tokens: int  # to compute before its next token
    limits: RequestLimits = NO_LIMITS
    priority: int = 0  # 0 for all where the scheduler serves first come, first served
    has_token: bool = False  # it was preempted after its first token


def _within(octaves: range, limit_s: float) -> float:
    return min(max(limit_s, 2.0 ** octaves[0]), 2.0 ** (octaves[-1] + 1))


def _octave(octaves: range, limit_s: float) -> int:
    return min(frexp(limit_s)[1] - 1, octaves[-1])


class LimitBook:
    """The limits of running requests, as one figure an octave. Constant cost per event."""

    def __init__(self) -> None:
        self._limits: dict[str, float] = {}  # request id |-> its limit
        self._counts = [0] * len(_TPOT_OCTAVES)
        self._sums_s = [0.0] * len(_TPOT_OCTAVES)
        self._frozen: tuple[OwnLimit, ...] | None = ()

    def add(self, request_id: str, limit_s: float) -> None:
        """Add a request that runs."""
        self.remove(request_id)
        limit_s = _within(_TPOT_OCTAVES, limit_s)
        self._limits[request_id] = limit_s
        self._count(limit_s, 1)

    def remove(self, request_id: str) -> None:
        """Drop a request that runs no longer. Unknown ids are ignored."""
        limit_s = self._limits.pop(request_id, None)
        if limit_s is not None:
            self._count(limit_s, -1)

    def limits(self) -> tuple[OwnLimit, ...]:
        """Return the limits, strictest first."""
        if self._frozen is None:
            figures = zip(self._sums_s, self._counts, strict=True)
            self._frozen = tuple(OwnLimit(total_s / count, count) for total_s, count in figures if count)
        return self._frozen

    def _count(self, limit_s: float, number: int) -> None:
        at = _octave(_TPOT_OCTAVES, limit_s) - _TPOT_OCTAVES[0]
        self._counts[at] += number
        # Empty is 0, so that no rounding outlives the requests that it came from.
        self._sums_s[at] = self._sums_s[at] + number * limit_s if self._counts[at] else 0.0
        self._frozen = None


@dataclass(slots=True, eq=False)
class _Group:
    """A cohort that still changes."""

    priority: int
    has_token: bool
    octave: int | None  # of the limit that it waits against, None without one
    came_s: float  # arrival of its first request ever: its place in the queue
    first_s: float  # of those that are still there
    last_s: float
    num_requests: int = 0
    num_tokens: int = 0
    limits_s: float = 0.0  # their sum
    into: _Group | None = None  # the neighbour it was merged into

    @property
    def kind(self) -> tuple[bool, int | None]:
        """The kind of requests that are judged alike."""
        return (self.has_token, self.octave)

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
        return (self.priority, self.kind) == (other.priority, other.kind)

    def frozen(self) -> Cohort:
        limit_s = None if self.octave is None else self.limits_s / self.num_requests
        ttft_s, tpot_s = (None, limit_s) if self.has_token else (limit_s, None)
        return Cohort(self.num_requests, self.num_tokens, self.first_s, self.last_s, ttft_s, tpot_s, self.has_token)


class WaitingBook:
    """The requests that wait, as a few cohorts in the order of service. Constant cost per event.

    Where there are more than `_MAX_COHORTS`, those of a kind join, also of other priorities; kinds never do.
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []  # ordered by _place
        # Request id |-> the group it came into, its tokens, its arrival, its limit.
        self._members: dict[str, tuple[_Group, int, float, float]] = {}
        self._frozen: tuple[Cohort, ...] | None = ()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, request: WaitingRequest, arrival_s: float) -> None:
        """Add a request that begins to wait."""
        self.remove(request.request_id)
        self._frozen = None
        limit_s, octave = _waits_against(request)
        new = _Group(request.priority, request.has_token, octave, arrival_s, arrival_s, arrival_s)
        group = self._home(new)
        group.num_requests += 1
        group.num_tokens += request.num_tokens
        group.limits_s += limit_s
        group.first_s = min(group.first_s, arrival_s)
        group.last_s = max(group.last_s, arrival_s)
        self._members[request.request_id] = (group, request.num_tokens, arrival_s, limit_s)

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
        group.limits_s -= member[3]
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
        """Join the two groups that differ least, of those that are alike; else of a kind, whatever their priorities."""
        pair = self._closest(lambda group: (group.priority, *group.kind)) or self._closest(lambda group: group.kind)
        if pair is None:  # every kind once: there cannot be more
            return
        kept, gone = pair
        self._groups.remove(gone)
        kept.num_requests += gone.num_requests
        kept.num_tokens += gone.num_tokens
        kept.limits_s += gone.limits_s
        kept.last_s = max(kept.last_s, gone.last_s)
        gone.into = kept

    def _closest(self, key: Callable[[_Group], Hashable]) -> tuple[_Group, _Group] | None:
        """Return the two groups with the same key that span the least time, the earlier one first."""
        before: dict[Hashable, _Group] = {}
        best: tuple[float, _Group, _Group] | None = None
        for group in self._groups:
            last = before.get(key(group))
            before[key(group)] = group
            if last is not None and (best is None or group.last_s - last.first_s < best[0]):
                best = (group.last_s - last.first_s, last, group)
        return None if best is None else best[1:]


def _waits_against(request: WaitingRequest) -> tuple[float, int | None]:
    """Return the limit that a request waits against, of its own, and its octave; 0 and None if it has none."""
    octaves = _TPOT_OCTAVES if request.has_token else _TTFT_OCTAVES
    asked_s = request.limits.tpot_s if request.has_token else request.limits.ttft_s
    if asked_s is None:
        return 0.0, None
    limit_s = _within(octaves, asked_s)
    return limit_s, _octave(octaves, limit_s)


def _place(group: _Group) -> tuple[int, bool, float]:
    return group.place
