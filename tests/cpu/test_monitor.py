"""Rolling figures: right values, and nothing that grows."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from morphserve.control import EngineView
from morphserve.control.monitor import AnswerLength, DecayingMean, Monitor, WindowRate
from morphserve.control.waiting import WaitingRequest
from policies import Signals

pytestmark = pytest.mark.cpu


def signals(monitor: Monitor, now: float, running: int = 1) -> Signals:
    return monitor.snapshot(now, EngineView(0, running, 0.0), 10, 3, 1, 2)


def test_view_is_passed_through() -> None:
    """Guards: two numbers exchanged on their way to the policy."""
    seen = Monitor().snapshot(5.0, EngineView(4, 3, 0.7), 10, 3, 1, 2)
    assert (seen.now_s, seen.num_kv_blocks, seen.used_kv_blocks, seen.level, seen.target_level) == (
        5.0,
        10,
        3,
        1,
        2,
    )
    assert (seen.num_waiting, seen.num_running, seen.oldest_wait_s) == (4, 3, 0.7)


def test_a_forced_preemption_waits_and_is_no_sign_of_trouble() -> None:
    """Guards: who was sent back for a restore forgotten, or taken for a lack of memory, which undoes the restore."""
    monitor = Monitor()
    monitor.on_preemption(1.0, WaitingRequest("a", 50, has_token=True), forced=True)
    monitor.on_preemption(2.0, WaitingRequest("b", 70, has_token=True))
    seen = monitor.snapshot(3.0, EngineView(2, 1, 2.0), 10, 3, 1, 0)
    assert seen.preemptions == 1 and sum(cohort.num_requests for cohort in seen.waiting) == 2


def test_mean_counts_values_of_one_instant_alike() -> None:
    """Guards: a burst in one step, of which only the last request counts."""
    mean = DecayingMean(5.0)
    for value in (1.0, 2.0, 6.0):
        mean.add(10.0, value)
    assert mean.value == pytest.approx(3.0)


def test_mean_forgets_by_time_and_not_by_count() -> None:
    """Guards: an average per event, which a quiet hour leaves at last hour's value."""
    mean = DecayingMean(5.0)
    for _ in range(1000):
        mean.add(0.0, 1.0)
    mean.add(100.0, 9.0)
    assert mean.value == pytest.approx(9.0, rel=1e-3)
    mean.add(1e9, 4.0)
    assert mean.value == pytest.approx(4.0)


def test_rate_over_the_window() -> None:
    """Guards: events that never leave the window, or a start-up rate diluted by time before the start."""
    rate = WindowRate()
    for i in range(20):
        rate.add(100.0 + i * 0.1)
    assert rate.rate(102.0) == pytest.approx(10.0, rel=0.05)
    assert rate.rate(109.0) == pytest.approx(20 / 9, rel=0.1)
    assert rate.rate(120.0) == 0.0
    assert rate.rate(1e7) == 0.0


def test_a_long_gap_costs_no_more_than_the_window() -> None:
    """Guards: a step that takes seconds after a quiet week, for each half second of it."""
    emptied: list[int] = []

    class Seen(list[int]):
        def __setitem__(self, at: Any, value: Any) -> None:
            emptied.append(at)
            super().__setitem__(at, value)

    rate = WindowRate()
    rate.add(0.0)
    rate._buckets = Seen(rate._buckets)
    assert rate.rate(100_000.0) == 0.0 and len(emptied) == len(rate._buckets)


def test_steady_rate_is_found() -> None:
    """Guards: a window that is not as long as it is said to be."""
    rate = WindowRate()
    for i in range(1000):
        rate.add(i * 0.125)
    assert rate.rate(125.0) == pytest.approx(8.0, rel=0.05)


def test_idle_gap_is_no_step() -> None:
    """Guards: the pause between two requests taken for one slow step."""
    for reported in (True, False):
        monitor = Monitor()
        monitor.on_step(0.0, 1)
        monitor.on_step(0.1, 1)
        if reported:
            monitor.on_idle()
        else:
            signals(monitor, 0.15, running=0)
        monitor.on_step(5.0, 1)
        monitor.on_step(5.1, 1)
        assert signals(monitor, 5.1).step_s == pytest.approx(0.1)
    monitor.on_step(3600.0, 1)
    assert signals(monitor, 3600.0).step_s == pytest.approx(0.1)


def test_tpot_weighs_steps_by_requests() -> None:
    """Guards: a step without decodes counted as a token's time."""
    monitor = Monitor()
    for now, decodes in ((0.0, 1), (0.1, 1), (0.4, 3), (2.4, 0)):
        monitor.on_step(now, decodes)
    assert signals(monitor, 2.4).tpot_s == pytest.approx((0.1 + 3 * 0.3) / 4, rel=0.05)


def test_requests_and_preemptions() -> None:
    """Guards: figures that arrive under the wrong name; requests that never ran counted as small."""
    monitor = Monitor()
    monitor.on_arrival(1.0)
    monitor.on_scheduled(1.2, 0.2)
    monitor.on_first_token(0.5)
    monitor.on_preemption(1.5)
    monitor.on_preemption(1.6)
    monitor.on_finish(8, 2.0)
    monitor.on_finish(0, 2.0)
    seen = signals(monitor, 2.0)
    assert (seen.queue_delay_s, seen.ttft_s, seen.blocks_per_request) == pytest.approx((0.2, 0.5, 8.0))
    assert seen.preemptions == 2
    assert (seen.arrival_rate, seen.preemption_rate) == (1.0, 2.0)


def test_cost_and_memory_do_not_grow() -> None:
    """Guards rule 7: a list of events, or work in proportion to the events so far."""
    monitor = Monitor()

    def run(start: int, count: int) -> int:
        calls = 0

        def count_calls(frame: object, event: str, arg: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count_calls)
        try:
            for i in range(start, start + count):
                now = i * 0.01
                monitor.on_arrival(now)
                monitor.on_scheduled(now, 0.1)
                monitor.on_first_token(0.2)
                monitor.on_step(now, 4)
                monitor.on_finish(5, now)
                monitor.on_preemption(now)
                signals(monitor, now)
        finally:
            sys.setprofile(None)
        return calls

    def size() -> int:
        parts = [part for part in vars(monitor).values() if hasattr(type(part), "__slots__")]
        values = [getattr(part, name) for part in parts for name in type(part).__slots__]
        return sum(len(value) if isinstance(value, list) else 1 for value in values)

    run(0, 5_000)
    first, size_before = run(5_000, 5_000), size()
    run(10_000, 85_000)
    assert run(95_000, 5_000) == first
    assert size() == size_before


def test_answers_that_have_not_ended_count_as_far_as_they_have_come() -> None:
    """Guards: in a burst the short answers, which end first, taken for all: KV that fills up looks roomy."""
    length = AnswerLength()
    length.on_tokens(700)
    assert length.value == 0.0, "nobody knows before one has ended"
    length = AnswerLength()
    for step in range(1, 201):  # 20 answers of 20 tokens and 20 of 400 begin together
        length.on_tokens(40 if step <= 20 else 20)
        if step == 20:
            for _ in range(20):
                length.on_end(1.0, 20)
            assert length.value == pytest.approx(20, rel=0.6), "nothing says yet that there are others"
    assert length.value > 150, "those that run have 200 tokens each"
    for _ in range(200):  # then the same length again and again: their mean, not what was thought in the burst
        length.on_tokens(100)
        length.on_end(60.0, 100)
    assert length.value == pytest.approx(100, rel=0.05)
