"""Ranks that answer late, and stages that hold other layers each."""

from __future__ import annotations

import logging

import pytest

from morphserve.config import MorphServeConfig, TransitionConfig
from morphserve.control import Phase, Plan
from morphserve.control.ranks import ReplyTracker
from tests.fakes import BASE_BLOCKS, KV_BLOCK_BYTES, LAYER_BYTES, FakeRank, Rig, pipeline
from tests.rank_rules import FakeTicket

pytestmark = pytest.mark.cpu

TIMEOUT_S = 3.0
STEP_S = 0.5


def lagging(num_ranks: int = 2, **fields: float) -> Rig:
    settings = {"max_layers_per_step": 2, "rank_timeout_s": TIMEOUT_S, "backoff_s": 5.0, **fields}
    return Rig(config=MorphServeConfig(transition=TransitionConfig.model_validate(settings)), num_ranks=num_ranks)


def wait(rig: Rig, seconds: float) -> None:
    """Ticks without a forward pass: a rank that is stuck comes to none."""
    for _ in range(round(seconds / STEP_S)):
        rig.now_s += STEP_S
        rig.tick()
        rig.executor.run_commands()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("start", "target"), [(0, 2), (4, 1)])
def test_a_rank_that_does_not_prepare_in_time_aborts_on_all(
    rank: int, start: int, target: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: one rank holds up the transition for ever, the others switch without it, or staged bytes stay."""
    rig = lagging()
    rig.go_to(start)
    rig.script.level = target
    while True:
        rig.tick()
        if rig.controller.phase is Phase.PREPARING:
            break
        rig.executor.forward(rig.pool)
    sent = len(rig.executor.sent)
    rig.executor.stuck = {rank}
    with caplog.at_level(logging.WARNING):
        wait(rig, TIMEOUT_S)
        assert rig.controller.phase is Phase.PREPARING and len(rig.executor.sent) == sent, "given up too early"
        wait(rig, 4 * STEP_S)
        assert rig.controller.phase is Phase.ABORTING
        assert [command for command, _ in rig.executor.sent[sent:]] == ["abort"]
        assert all(r.formats == list(rig.ladder[start].layer_formats) for r in rig.executor.ranks)
        rig.executor.stuck = set()
        rig.step(4)
    assert rig.controller.phase is Phase.IDLE and not rig.controller.failed
    assert rig.controller.level == rig.controller.effective_level == start
    assert all(r.staged is None for r in rig.executor.ranks) and rig.ledger["staging"] == 0
    assert rig.pool.num_kv_blocks == rig.ladder[start].num_kv_blocks
    assert rig.controller.counters.errors == {"rank_timeout": 1} and rig.executor.num_undrained == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "transition.rank_timeout_s is 3" in caplog.text and "no new attempt for 5.0 s" in caplog.text
    sent = len(rig.executor.sent)
    rig.step(40)  # 2 s: nothing starts in the back-off
    assert len(rig.executor.sent) == sent
    rig.step(80)
    rig.go_to(target)


def test_a_slow_prepare_counts_as_late_even_when_all_have_answered(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: steps stand still behind a rank with a dying disk, batch after batch, because its answer is in by
    the time anybody looks; or the next attempt asks it for as many layers again."""
    rig = lagging(max_layers_per_step=3)
    rig.executor.seconds_per_layer = 1.5  # 3 layers: 4.5 s
    rig.script.level = 1
    rig.step(10)
    assert rig.controller.level == 0 and rig.controller.counters.errors == {"rank_timeout": 1}
    assert "rank 0 took 4.5 s, rank 1 took 4.5 s to prepare" in caplog.text
    rig.step(120)
    asked = [len(plan.layer_formats) for command, plan in rig.executor.sent if command == "prepare"]
    assert asked[:2] == [3, 1] and rig.controller.level == 1


def test_late_answers_are_dropped_by_revision() -> None:
    """Guards: the answer to a plan that was given up is taken for that of the next, and ranks switch on it."""
    rig = lagging(backoff_s=0.0)
    delays = iter([30])  # polls: the first prepare's answers are on their way when it is given up
    rig.executor.delay = lambda: next(delays, 0)
    rig.script.level = 1
    rig.tick()
    first = rig.executor.tickets[0]
    rig.executor.fail = lambda command, plan, r: (
        "no memory" if command == "prepare" and r == 1 and plan.revision > 1 else ""
    )
    wait(rig, TIMEOUT_S + 3 * STEP_S)
    assert not first.taken and rig.controller.counters.errors["rank_timeout"] == 1
    rig.step(60)
    assert first.taken and rig.executor.num_undrained <= 1  # of an attempt under way
    assert rig.controller.level == 0 and rig.controller.counters.errors["prepare"] > 1
    assert "commit" not in {command for command, _ in rig.executor.sent}


@pytest.mark.parametrize("command", ["commit", "abort", "alone"])
def test_what_cannot_be_taken_back_is_waited_for_and_said_once(command: str, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: blocks published while a rank has not answered, a log line at every step, or silence for ever."""
    rig = lagging(num_ranks=1 if command == "alone" else 2)
    if command == "abort":
        rig.executor.fail = lambda sent, plan, r: "no memory" if sent == "prepare" else ""
    rig.executor.delay = lambda: 40 if rig.executor.sent and rig.executor.sent[-1][0] == command else 0
    keep = rig.executor._send

    def send(name: str, plan: Plan) -> object:
        rig.executor.delay = lambda: 40 if name == command else 0
        return keep(name, plan)

    rig.executor._send = send  # type: ignore[method-assign,assignment]
    rig.script.level = 1
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            rig.step(seconds=STEP_S)
            assert rig.pool.num_kv_blocks == BASE_BLOCKS
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1 and f"goes on with {BASE_BLOCKS} KV blocks and waits" in said[0]
        rig.executor.fail = lambda sent, plan, r: ""
        rig.step(60, seconds=STEP_S)
    assert rig.controller.level == 1 and not rig.controller.failed
    assert "rank_timeout" not in rig.controller.counters.errors


@pytest.mark.parametrize("cuts", [(4,), (5,), (2, 5)])
def test_stages_free_in_turn_and_hold_only_their_own(cuts: tuple[int, ...]) -> None:
    """Guards: a stage over its budget in mid-transition, or KV that comes only when the last stage has freed."""
    rig = Rig(ranks=pipeline(LAYER_BYTES, KV_BLOCK_BYTES * 8, *cuts), layers_per_level=len(cuts) + 1)
    for level in (*range(len(rig.ladder)), 2, 5, 0):
        rig.go_to(level)
        assert rig.pool.num_kv_blocks == rig.ladder[level].num_kv_blocks
        for rank, ledger, sizes in zip(rig.executor.ranks, rig.ledgers, rig.ranks, strict=True):
            assert rank.formats == list(rig.ladder[level].layer_formats)
            assert ledger["weights"] == sizes.weight(rank.formats) and ledger["staging"] == 0
            assert ledger["kv_blocks"] == rank.mapped * sizes.kv_block_bytes
    status = rig.controller.status()
    assert len(status["ledgers"]) == len(cuts) + 1 and status["ledger"] in status["ledgers"]


def test_a_batch_takes_layers_of_all_stages(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: stages that could work at the same time and wait for each other instead."""
    rig = Rig(ranks=pipeline(LAYER_BYTES, KV_BLOCK_BYTES * 8, 4), layers_per_level=8)
    rig.go_to(1)
    prepared = [plan for command, plan in rig.executor.sent if command == "prepare"]
    batches = [[layer for layer, _ in plan.layer_formats] for plan in prepared]
    assert batches == [[0, 4, 1, 5], [2, 6, 3, 7]]  # two layers a stage


def test_a_rank_over_its_budget_is_refused_on_all() -> None:
    """Guards: a ledger that books on the first ranks what the last one has no room for."""
    rig = Rig(ranks=pipeline(LAYER_BYTES, KV_BLOCK_BYTES * 8, 4), staging_bytes=700)
    before = rig.ledgers.snapshots()
    for call in (lambda: rig.ledgers.reserve_staging([1, 701]), lambda: rig.ledgers.book_kv(BASE_BLOCKS + 2)):
        with pytest.raises(Exception, match="Release first"):
            call()
        assert rig.ledgers.snapshots() == before and rig.ledgers.num_kv_blocks == BASE_BLOCKS
    assert isinstance(rig.executor.ranks[1], FakeRank)


def test_answers_that_nobody_waits_for_count_too() -> None:
    """Guards: a plan that was given up leaves its answers on the ring, and copies fill the rest."""
    replies = ReplyTracker(copies=[FakeTicket(9, 1)] * 2)
    assert not replies.is_full
    replies.late.append(FakeTicket(9, 1))
    assert replies.is_full
