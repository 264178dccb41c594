"""Which requests were late, as the engine sees them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from morphserve.control import NO_LIMITS, RequestLimits
from morphserve.integration.engine.request_limits import LateCount, promise_of
from policies import SloConfig, ThresholdConfig

PROMISE = RequestLimits(ttft_s=2.0, tpot_s=0.1)


def request(name: str = "a", tokens: int = 11, **own: float) -> Any:
    """A request that arrived at 100 s and has so many tokens."""
    asked = {f"morphserve_{key}": value for key, value in own.items()}
    params = SimpleNamespace(extra_args=asked)
    return SimpleNamespace(request_id=name, arrival_time=100.0, num_output_tokens=tokens, sampling_params=params)


def told(count: LateCount) -> tuple[int, int, int, int]:
    found = count.as_json(110.0)
    return found["num_judged"], found["num_late"], found["num_late_ttft"], found["num_late_tpot"]


@pytest.mark.parametrize(
    ("first_s", "end_s", "expected"),
    [
        (101.9, 102.8, (1, 0, 0, 0)),
        (102.1, 103.0, (1, 1, 1, 0)),
        (101.0, 102.1, (1, 1, 0, 1)),
        (103.0, 109.0, (1, 1, 1, 1)),
    ],
)
def test_each_limit_is_held(first_s: float, end_s: float, expected: tuple[int, ...]) -> None:
    """Guards: one of the two limits is not looked at, or a request that breaks both counts twice."""
    count = LateCount(PROMISE)
    count.on_first_token(request(), first_s)
    count.on_finish(request(), end_s)
    assert told(count) == expected


def test_what_a_request_asked_for_goes_before_the_policys() -> None:
    """Guards: a request with a limit of its own is judged by everybody's."""
    count = LateCount(PROMISE)
    for own in ({"ttft_s": 0.5}, {"ttft_s": 9.0}, {"tpot_s": 0.01}):
        count.on_first_token(request(**own), 101.0)
        count.on_finish(request(**own), 101.5)
    assert told(count) == (3, 2, 1, 1)


def test_a_policy_without_limits_judges_nobody() -> None:
    """Guards: a share of late requests from a server that has promised nothing."""
    assert promise_of(ThresholdConfig(kind="threshold")) == NO_LIMITS
    assert promise_of(SloConfig(kind="slo", ttft_s=3.0, tpot_s=0.2)) == RequestLimits(3.0, 0.2)
    count = LateCount(promise_of(ThresholdConfig(kind="threshold")))
    count.on_finish(request(), 999.0)
    assert told(count) == (0, 0, 0, 0) and count.as_json(110.0)["num_ended"] == 1
    count.policy = PROMISE  # another policy while it runs
    count.on_finish(request(), 999.0)
    assert told(count) == (1, 1, 1, 0)


def test_an_answer_of_one_token_and_one_that_never_came() -> None:
    """Guards: the first token that is the last divides by 0; a client that left at once counts as served in time."""
    count = LateCount(PROMISE)
    count.on_finish(request(tokens=1), 101.0)
    assert told(count) == (1, 0, 0, 0)
    count.on_finish(request(tokens=0), 101.0)  # nobody knows
    assert told(count) == (1, 0, 0, 0)
    count.on_finish(request(tokens=0), 105.0)  # it had waited too long already
    assert told(count) == (2, 1, 1, 0)


def test_only_the_last_are_recent_and_nothing_is_kept() -> None:
    """Guards: an overload of this morning in the share of now, or a book of requests that grows with uptime."""
    count = LateCount(PROMISE, num_recent=10)
    for i in range(30):
        count.on_first_token(request(str(i)), 103.0 if i < 25 else 101.0)
        count.on_finish(request(str(i)), 103.5 if i < 25 else 101.5)
    assert count.as_json(110.0)["recent"] == {"num_judged": 10, "num_late": 5}
    assert count.as_json(399.0)["recent"]["num_judged"] == 10
    assert count.as_json(403.6)["recent"] == {"num_judged": 0, "num_late": 0}  # 300 s after the last
    assert not count._first_token_s
