"""The waiting queue in cohorts: what a policy predicts from must add up, in the right order, at any length."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.control.waiting import NO_LIMITS, LimitBook, RequestLimits, WaitingBook, WaitingRequest

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "remove", "serve", "preempt"]),
        st.integers(0, 200),
        st.integers(1, 500),
        st.sampled_from([NO_LIMITS, RequestLimits(ttft_s=0.5), RequestLimits(tpot_s=0.1)]),
        st.integers(0, 2),
    ),
    max_size=300,
)


@given(EVENTS)
def test_cohorts_add_up_to_who_waits(events: list[tuple[str, int, int, RequestLimits, int]]) -> None:
    """Guards: requests that are counted twice, or never leave, after groups were merged."""
    book, waiting = WaitingBook(), dict[str, int]()
    for now, (what, number, tokens, limits, priority) in enumerate(events):
        name = str(number)
        if what in ("remove", "serve"):
            getattr(book, what)(name)
            waiting.pop(name, None)
        else:
            book.add(WaitingRequest(name, tokens, limits, priority, has_token=what == "preempt"), now * 0.05)
            waiting[name] = tokens
        cohorts = book.cohorts()
        assert sum(c.num_requests for c in cohorts) == len(waiting) == len(book)
        assert sum(c.num_tokens for c in cohorts) == sum(waiting.values())
        assert len(cohorts) <= 24 and all(c.num_requests > 0 for c in cohorts)
        assert all(c.first_arrival_s <= c.last_arrival_s for c in cohorts)


def test_the_next_one_to_be_served_comes_first() -> None:
    """Guards: preempted requests, which vLLM serves first, predicted to wait behind the queue; urgency ignored."""
    book = WaitingBook()
    for number in range(3):
        book.add(WaitingRequest(f"w{number}", 10), float(number))
    book.add(WaitingRequest("preempted", 70, has_token=True), 5.0)
    assert [c.num_tokens for c in book.cohorts()] == [70, 10, 10, 10]
    book.add(WaitingRequest("urgent", 99, priority=-1), 6.0)
    assert [c.num_tokens for c in book.cohorts()] == [99, 70, 10, 10, 10]


def test_neighbours_in_time_are_one_cohort_and_classes_are_not() -> None:
    """Guards: a request with a limit of its own judged by another's."""
    book = WaitingBook()
    for number in range(4):
        book.add(WaitingRequest(str(number), 10), number * 0.01)
    book.add(WaitingRequest("strict", 10, limits=RequestLimits(ttft_s=0.3)), 0.05)
    assert [(c.num_requests, c.ttft_s) for c in book.cohorts()] == [(4, None), (1, 0.3)]


def test_classes_that_alternate_stay_apart() -> None:
    """Guards: everybody judged by the strictest limit in the queue, and so given up as lost."""
    book = WaitingBook()
    for number in range(200):
        limits = RequestLimits(ttft_s=0.5) if number % 2 else NO_LIMITS
        book.add(WaitingRequest(str(number), 3, limits=limits), number * 0.05)
    cohorts = book.cohorts()
    assert len(cohorts) <= 24
    assert [sum(c.num_requests for c in cohorts if c.ttft_s == limit) for limit in (None, 0.5)] == [100, 100]


def test_a_cohort_whose_front_was_served_begins_later() -> None:
    """Guards: those who are left taken for as old as those who are gone."""
    book = WaitingBook()
    for number in range(5):
        book.add(WaitingRequest(str(number), 10), number * 0.02)
    book.serve("0")
    book.serve("1")
    book.remove("4")  # gave up: says nothing about those before it
    assert [(c.num_requests, c.first_arrival_s, c.last_arrival_s) for c in book.cohorts()] == [(2, 0.02, 0.08)]


@pytest.mark.parametrize("count", [100, 10_000])
def test_a_long_queue_is_few_cohorts(count: int) -> None:
    """Guards: a policy whose cost grows with the queue."""
    book = WaitingBook()
    for number in range(count):
        book.add(WaitingRequest(str(number), 3), number * 0.5)
    cohorts = book.cohorts()
    assert len(cohorts) <= 24 and sum(c.num_requests for c in cohorts) == count
    assert list(cohorts) == sorted(cohorts, key=lambda c: c.first_arrival_s)


LIMITS_S = st.none() | st.floats(min_value=5e-324, max_value=1.7e308)


@given(st.lists(st.tuples(LIMITS_S, LIMITS_S, st.booleans(), st.integers(-1000, 1000)), min_size=1, max_size=300))
def test_nobody_is_judged_by_a_neighbours_limit(asked: list[tuple[float | None, float | None, bool, int]]) -> None:
    """Guards: a full table in which requests without a limit, or with a loose one, get that of a stricter neighbour."""
    book = WaitingBook()
    for number, (ttft_s, tpot_s, has_token, priority) in enumerate(asked):
        request = WaitingRequest(str(number), 3, RequestLimits(ttft_s, tpot_s), priority, has_token)
        book.add(request, number * 0.5)
    cohorts = book.cohorts()
    assert len(cohorts) <= 32
    for has_token, name, least, most in ((False, "ttft_s", 2**-7, 2**8), (True, "tpot_s", 2**-11, 2**4)):
        own = [limits[has_token] for limits in asked if limits[2] == has_token]
        judged = [(getattr(c, name), c.num_requests) for c in cohorts if c.has_token == has_token]
        assert sum(n for limit, n in judged if limit is None) == own.count(None)
        by_limit = sorted(limit for limit, n in judged if limit is not None for _ in range(n))
        for limit, mine in zip(by_limit, sorted(limit for limit in own if limit is not None), strict=True):
            mine = min(max(mine, least), most)
            assert mine / 2 < limit <= mine * 2, (limit, mine)


@given(st.lists(st.tuples(st.integers(0, 40), st.none() | st.floats(1e-12, 1e12)), max_size=200))
def test_running_limits_add_up(events: list[tuple[int, float | None]]) -> None:
    """Guards: a request that has ended and is still judged, or one that is judged by another's limit."""
    book, running = LimitBook(), dict[str, float]()
    for number, limit_s in events:
        if limit_s is None:
            book.remove(str(number))
            running.pop(str(number), None)
        else:
            book.add(str(number), limit_s)
            running[str(number)] = min(max(limit_s, 2.0**-11), 2.0**4)
        found = [own.limit_s for own in book.limits() for _ in range(own.num_requests)]
        assert len(book.limits()) <= 15 and len(found) == len(running)
        for judged, mine in zip(found, sorted(running.values()), strict=True):
            assert mine / 2 < judged < mine * 2.000001


def test_limits_of_requests_cost_the_same_however_many_run() -> None:
    """Guards: the strictest limit looked for anew among all that run, at each start and each end."""
    class Limits(dict[str, float]):
        """Tells when somebody walks through it."""

        def __iter__(self) -> Iterator[str]:
            raise AssertionError("walks")

        values = items = keys = __iter__  # type: ignore[assignment]

    book = LimitBook()
    book._limits = Limits()
    for number in range(1000):
        book.add(str(number), 0.05 + number * 1e-5)
        book.limits()
    for number in range(1000):
        book.remove(str(number))
        book.limits()
    assert book.limits() == ()


def test_priorities_join_before_limits_do() -> None:
    """Guards: a full table of as many limits as there are, at two priorities, in which the nearest join, whoever."""
    book, limits_s = WaitingBook(), [2.0**octave for octave in range(-7, 8)]
    for priority in (0, 1):
        for number, ttft_s in enumerate(limits_s):
            request = WaitingRequest(f"{priority} {number}", 8, RequestLimits(ttft_s=ttft_s), priority)
            book.add(request, number * 10.0)
    cohorts = book.cohorts()
    assert len(cohorts) == 24 and sum(cohort.num_requests for cohort in cohorts) == 30
    assert {cohort.ttft_s for cohort in cohorts} == set(limits_s)


def test_no_rounding_outlives_its_requests() -> None:
    """Guards: limits that drift for as long as a server runs."""
    book, limits_s = LimitBook(), (0.07, 0.1, 0.11, 0.12)
    for limit_s in limits_s:
        book.add(str(limit_s), limit_s)
    for limit_s in limits_s:
        book.remove(str(limit_s))
    book.add("another", 0.1)
    assert book.limits()[0].limit_s == 0.1
