"""The waiting queue in cohorts: what a policy predicts from must add up, in the right order, at any length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.control.waiting import NO_LIMITS, RequestLimits, WaitingBook, WaitingRequest

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
