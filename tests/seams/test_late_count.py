"""Which requests were late, as the engine sees them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from seams.logged import records_of

from morphserve.config import parse_config
from morphserve.control import NO_LIMITS
from morphserve.integration.engine import hooks
from morphserve.integration.engine.requests.request_limits import LateCount, limits_of
from morphserve.integration.engine.requests.traffic import StepInFlight, Traffic
from policies import Promise, SloConfig, ThresholdConfig, promise_of
from tests.fakes import Rig

PROMISE = Promise(ttft_s=2.0, tpot_s=0.1)


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


def test_what_is_no_time_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a log that a client fills, a warning for each of its requests; or one as long as what it sent; an error,
    after which no policy is asked any more."""
    monkeypatch.setattr("morphserve.integration.engine.requests.request_limits._warned", set())
    caplog.set_level(logging.DEBUG, "vllm.morphserve")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for value in ("soon" * 1000, -1.0, 0, float("nan"), [1], 10**400):
        assert limits_of(request(tpot_s=value)) == NO_LIMITS  # type: ignore[arg-type]
    records = records_of(caplog)
    assert [record.levelno for record in records] == [logging.WARNING] + 5 * [logging.DEBUG]
    assert len(records[0].getMessage()) < 250


@pytest.mark.parametrize("num_output_tokens", [0, 3])
def test_a_preempted_request_that_is_sent_as_new_has_come_before(num_output_tokens: int) -> None:
    """Guards: the second model runner, to which vLLM sends preempted requests as new ones: each preemption would count
    as a wait since the request came, and as a first token that was late."""
    seen: list[str] = []
    new, again = (lambda *_, word=word: seen.append(word) for word in ("new", "again"))
    one = request("a", 0)
    scheduler: Any = SimpleNamespace(requests={"a": one})
    monitor: Any = SimpleNamespace(on_scheduled=new, on_resumed=again)
    traffic = Traffic(scheduler, monitor)
    sent = [SimpleNamespace(req_id="a")]
    traffic.on_scheduled(sent, ())
    if num_output_tokens:
        one.num_output_tokens = num_output_tokens
        traffic._awaiting_first_token.clear()
    traffic.on_scheduled(sent, ())
    assert seen == ["new", "again"] and list(traffic._awaiting_first_token) == ["a"] * (not num_output_tokens)


@pytest.mark.parametrize("num_output_tokens", [0, 1])
def test_who_leaves_before_its_first_token_is_not_kept(num_output_tokens: int) -> None:
    """Guards: aborted requests with their prompts held until the next step, a night later; or an answer of one token,
    which ends before its step is looked at, without a time to that token."""
    one = request("a", 0)
    manager = SimpleNamespace(get_block_ids=lambda name: ([1],))
    scheduler: Any = SimpleNamespace(requests={"a": one}, kv_cache_manager=manager)
    monitor: Any = SimpleNamespace(on_scheduled=lambda *_: None, on_finish=lambda *_: None)
    traffic = Traffic(scheduler, monitor)
    traffic.on_scheduled([SimpleNamespace(req_id="a")], ())
    one.num_output_tokens = num_output_tokens
    traffic.on_finish(one)
    assert len(traffic._awaiting_first_token) == num_output_tokens


def test_a_floor_is_judged_by() -> None:
    """Guards: requests with an impossible limit counted as late, which the operator does not let them ask for."""
    deaf = Promise(2.0, 0.1, heeds_requests=False)
    for promise, late in ((Promise(2.0, 0.1, 0.5, 0.05), 0), (deaf, 0), (PROMISE, 1)):
        count = LateCount(promise)
        asked = request(ttft_s=1e-9, tpot_s=1e-9)
        count.on_first_token(asked, 100.4)
        count.on_finish(asked, 100.8)
        assert told(count)[1] == late


def test_a_policy_without_limits_judges_nobody() -> None:
    """Guards: a share of late requests from a server that has promised nothing."""
    assert promise_of(ThresholdConfig(kind="threshold")) == Promise()
    assert promise_of(SloConfig(kind="slo", ttft_s=3.0, tpot_s=0.2)) == Promise(3.0, 0.2, 0.75, 0.05)
    count = LateCount(promise_of(ThresholdConfig(kind="threshold")))
    count.on_finish(request(), 999.0)
    assert told(count) == (0, 0, 0, 0) and count.as_json(110.0)["num_ended"] == 1
    count.promise = PROMISE  # another policy while it runs
    count.on_finish(request(), 999.0)
    assert told(count) == (1, 1, 1, 0)


@pytest.fixture
def morph(monkeypatch: pytest.MonkeyPatch) -> Iterator[hooks.Morph]:
    """The hooks of an engine without a settings' file, around a controller, with nothing of vLLM's behind them."""
    for name in ("publish_base", "VllmBlockPool", "Provenance", "Receipts", "RpcExecutor", "StatusPage"):
        monkeypatch.setattr(hooks, name, lambda *args: SimpleNamespace())
    monkeypatch.setattr(hooks, "for_this_device", lambda config, vllm_config: config)
    rig, config = Rig(), parse_config({"policy": {"kind": "slo", "ttft_s": 4.0, "tpot_s": 0.4}})
    monkeypatch.setattr(hooks.Morph, "_make_controller", lambda self: rig.controller)
    limits = {"block_size": 16, "max_num_seqs": 32, "max_num_batched_tokens": 2048, "async_scheduling": None}
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(**limits), scheduler_config=SimpleNamespace(**limits),
        observability_config=SimpleNamespace(otlp_traces_endpoint=None),
    )  # fmt: skip
    engine_core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=None))
    runtime: Any = SimpleNamespace(
        index=0, config=config, stated=config, config_file=None, vllm_config=vllm_config, ladder=rig.ladder,
        decision_log=None, engine_core=engine_core, base_num_blocks=20, ranks=[], in_background=None,
        take_spare=lambda: None,
    )  # fmt: skip
    scheduler: Any = SimpleNamespace(kv_cache_manager=None, cache_config=vllm_config.cache_config)
    made = hooks.Morph(scheduler, runtime)
    yield made
    made.close()


def test_the_promise_is_that_of_the_policy_that_is_asked(morph: hooks.Morph) -> None:
    """Guards: requests judged by the limits of a policy that is no longer asked, or that was refused; by none from the
    start. Or let to ask for levels that a reload has forbidden."""
    assert not morph.gate.floors.are_allowed
    assert morph.traffic.late.promise == Promise(4.0, 0.4, 1.0, 0.1)
    for sent, is_taken, promise in (
        ("{kind: slo, ttft_s: 3.0, tpot_s: 0.2}", True, Promise(3.0, 0.2, 0.75, 0.05)),
        ("{kind: slo, ttft_s: 9.0, max_level: w3}", False, Promise(3.0, 0.2, 0.75, 0.05)),
        ("{kind: threshold}", True, Promise()),
    ):
        answer = morph.reload("POST", f"policy: {sent}").result(30)
        assert (answer["ok"], morph.traffic.late.promise) == (is_taken, promise), answer["error"]
    assert morph.reload("POST", "policy: {kind: threshold, floors: {shallowest: 0}}").result(30)["ok"]
    assert morph.gate.floors.are_allowed


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


@pytest.mark.parametrize("ends_with_it", [False, True])
@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_clock_that_is_set_ages_nobody(monkeypatch: pytest.MonkeyPatch, jump_s: float, ends_with_it: bool) -> None:
    """Guards: a burst's answer, deeper levels and late requests, to an hour that nobody has waited."""
    now = SimpleNamespace(wall_s=100.5, s=7.0)
    clocks = SimpleNamespace(time=lambda: now.wall_s, monotonic=lambda: now.s)
    monkeypatch.setattr("morphserve.integration.engine.requests.traffic.time", clocks)
    waiter = request(tokens=0)
    waiter.__dict__.update(num_preemptions=0, num_tokens=8, num_computed_tokens=0, is_finished=lambda: False)
    told: list[float] = []
    monitor: Any = SimpleNamespace(
        on_arrival=lambda *_: None, on_scheduled=lambda _, wait_s, *rest: told.append(wait_s),
        on_first_token=told.append, on_step=lambda *_: None, on_preemption=lambda *_: None, on_finish=lambda *_: None,
    )  # fmt: skip
    blocks = SimpleNamespace(get_block_ids=lambda _: [[1]])
    scheduler: Any = SimpleNamespace(
        policy=None, block_size=16, requests={"a": waiter}, waiting=_Queue(lambda: waiter), kv_cache_manager=blocks,
        num_waiting_for_streaming_input=0, get_request_counts=lambda: (0, 1),
    )  # fmt: skip
    traffic = Traffic(scheduler, monitor)
    traffic.late.promise = PROMISE
    traffic.on_arrival(waiter)  # half a second after vLLM's front has stamped it
    now.s, now.wall_s = 8.0, 101.5 + jump_s
    assert traffic.view().oldest_wait_s == pytest.approx(1.5)
    traffic.on_scheduled([SimpleNamespace(req_id="a")], [])
    waiter.num_output_tokens = 1
    if ends_with_it:  # its first token is its last
        traffic.on_finish(waiter)
    traffic.on_step(1, StepInFlight(0, num_tokens=8, num_seqs=1), ())
    traffic.on_preemption(waiter)
    waiter.num_preemptions = 1
    now.s, now.wall_s = 8.25, 101.75
    assert traffic.view().oldest_wait_s == pytest.approx(0.25)
    if not ends_with_it:
        traffic.on_finish(waiter)
    assert told == pytest.approx([1.5, 1.5])
    found = traffic.late.as_json(now.wall_s)
    assert (found["num_judged"], found["num_late"]) == (1, 0) and not traffic._arrived_s


class _Queue:
    def __init__(self, peek_request: Any) -> None:
        self.peek_request = peek_request

    def __len__(self) -> int:
        return 1
