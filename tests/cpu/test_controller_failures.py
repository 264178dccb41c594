"""What goes wrong: a full cache, ranks that cannot, a policy or a port that raises."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest

from morphserve.config import MorphServeConfig, TransitionConfig
from morphserve.control import Health, Phase
from morphserve.control.transition import TransitionHistory
from morphserve.control.transition_book import DirectionBackOff
from morphserve.errors import IllegalTransition
from tests.fakes import Rig

pytestmark = pytest.mark.cpu


def fail_prepare(rank: int) -> object:
    return lambda command, plan, r: "no memory" if command == "prepare" and r == rank else ""


def test_drain_timeout_keeps_the_old_level_and_allows_degrading() -> None:
    """Guards: a full cache fences its tail for ever, or blocks the degrade that would help."""
    rig = Rig()
    rig.go_to(3)
    assert rig.pool.allocate(1, rig.pool.num_kv_blocks - 1)
    rig.step()
    rig.script.level = 2
    rig.step(120)  # 6 s
    assert rig.controller.counters.transitions[("restore", "aborted")] == 1
    assert rig.controller.phase is Phase.IDLE and rig.pool.fence is None
    rig.go_to(4, steps=6)


def full_and_waiting() -> Rig:
    """At level 3, with a request that fills the cache, right after a restore has given up."""
    rig = Rig()
    rig.go_to(3)
    assert rig.pool.allocate(1, rig.pool.num_kv_blocks - 1)
    rig.step()
    rig.script.level = 0
    while ("restore", "aborted") not in rig.controller.counters.transitions:
        rig.step()
    return rig


def test_a_wait_for_room_ends_with_room() -> None:
    """Guards: an engine whose requests have left stays quantized until a back-off is over, or tries without room."""
    rig = full_and_waiting()
    rig.step(5)
    assert rig.controller.phase is Phase.IDLE and not rig.controller.wants_wakeup
    rig.pool.finish(1)
    assert rig.controller.wants_wakeup, "idle from here on"
    rig.step(40)  # 2 s, and 5 s are a back-off
    assert rig.controller.level == 0


def test_room_ends_no_wait_after_a_fault() -> None:
    """Guards: a restore that fails is tried again at every step of an engine that has room."""
    rig = full_and_waiting()
    rig.executor.fail = lambda command, plan, rank: "no memory" if command == "prepare" else ""  # type: ignore[assignment]
    rig.pool.finish(1)
    rig.step(80)  # 4 s
    assert rig.controller.counters.transitions[("restore", "aborted")] == 2


@pytest.mark.parametrize(("num_used_blocks", "ends"), [(120, True), (119, False)])
def test_only_a_wait_for_room_ends_with_room(num_used_blocks: int, ends: bool) -> None:
    """Guards: a drain that something else than a full cache has stopped starts anew at the next step."""
    backoff = DirectionBackOff(TransitionConfig())
    backoff.drain_timed_out(0.0, 120, num_used_blocks)
    assert not backoff.allows(0.1, "restore")
    backoff.see_room(119)
    assert backoff.allows(0.1, "restore") is ends


def test_room_ends_no_wait_that_a_failed_degrade_asks_for() -> None:
    """Guards: a fault between the two forgotten because a drain had timed out before it."""
    backoff = DirectionBackOff(TransitionConfig())
    backoff.drain_timed_out(0.0, 120, 120)
    backoff.failed(0.1, "degrade")
    backoff.see_room(0)
    assert not backoff.allows(0.2, "restore")


@pytest.mark.parametrize("allowed", [0, 1, 2, 20])
def test_a_shrink_without_room_preempts_within_its_bound(allowed: int) -> None:
    """Guards: requests started again although nobody allowed it, more of them than allowed, or the last one."""
    rig = Rig(config=MorphServeConfig.model_validate({"kv": {"max_preemptions": allowed}}))
    rig.go_to(3)
    blocks = rig.pool.num_kv_blocks - 1
    for request in range(8):
        assert rig.pool.allocate(request, blocks // 8)
    rig.step()
    rig.script.level = 0
    rig.step(60 * (allowed + 2))  # 3 s each: more than half of the time that a drain has
    counters = rig.controller.counters
    assert len(rig.pool.preempted) == counters.forced_preemptions <= allowed
    assert (counters.forced_preemptions > 0) == (allowed > 0)
    assert (rig.controller.level == 0) == (allowed == 20)
    assert rig.pool.held
    rig.script.level = 3
    rig.step(200)
    assert rig.controller.level == 3 and counters.forced_preemptions <= allowed
    before = counters.forced_preemptions
    for request in range(100, 108):  # a new burst, a new bound
        rig.pool.allocate(request, min(blocks // 8, len(rig.pool.free)))
    rig.step()
    rig.script.level = 0
    rig.step(60 * (allowed + 2))
    assert (counters.forced_preemptions > before) == (allowed > 0)
    assert counters.forced_preemptions <= before + allowed


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("start", "target"), [(0, 2), (4, 1)])
def test_failed_prepare_leaves_the_old_level(
    rank: int, start: int, target: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards rule 6: a failed rank leaves others switched, blocks lost, or no line, count, back-off."""
    rig = Rig()
    rig.go_to(start)
    rig.executor.fail = fail_prepare(rank)  # type: ignore[assignment]
    rig.script.level = target
    with caplog.at_level(logging.WARNING):
        rig.step(20)
    assert rig.controller.level == start and rig.controller.phase is Phase.IDLE
    assert rig.pool.num_kv_blocks == rig.ladder[start].num_kv_blocks
    assert all(r.staged is None for r in rig.executor.ranks) and rig.ledger["staging"] == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"rank {rank}: no memory" in caplog.text
    assert rig.controller.counters.errors == {"prepare": 1}
    assert sum(command == "prepare" for command, _ in rig.executor.sent if _.layer_formats) >= 1
    rig.executor.fail = lambda command, plan, r: ""
    rig.step(100)  # the back-off of 5 s is over
    rig.go_to(target)


def test_backoff_holds_off_new_attempts() -> None:
    """Guards: a rank without memory is asked again at every step."""
    rig = Rig()
    rig.executor.fail = fail_prepare(0)  # type: ignore[assignment]
    rig.script.level = 1
    rig.step(200)  # 10 s of steps, back-off 5 s
    assert sum(command == "prepare" for command, _ in rig.executor.sent) == 2


def attempts(rig: Rig, seconds: float) -> list[float]:
    """When layers were asked for, in seconds from now, over so many seconds."""
    start, seen, found = rig.now_s, len(rig.executor.sent), []
    while rig.now_s - start < seconds:
        now = rig.now_s
        rig.step()
        new = rig.executor.sent[seen:]
        found += [now - start for command, plan in new if command == "prepare" and plan.layer_formats]
        seen = len(rig.executor.sent)
    return found


def test_what_keeps_failing_waits_longer_and_success_forgives() -> None:
    """Guards: a damaged file costs KV and a warning every five seconds for ever; or one bad hour for good."""
    config = TransitionConfig(max_layers_per_step=3, backoff_s=1.0, backoff_max_s=5.0)
    rig = Rig(config=MorphServeConfig(transition=config))
    rig.go_to(1)
    works = rig.executor.fail
    for _ in range(2):  # the second time as the first: a transition that arrived has reset it
        rig.executor.fail = fail_prepare(0)  # type: ignore[assignment]
        rig.script.level = 0
        times = attempts(rig, 30.0)
        gaps = [after - before for before, after in pairwise(times)]
        assert gaps[:5] == pytest.approx([1.0, 2.0, 4.0, 5.0, 5.0], abs=0.3)
        rig.executor.fail = works
        attempts(rig, 6.0)
        assert rig.controller.level == 0
        rig.go_to(1)


def test_what_keeps_failing_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a damaged file that is a warning a minute for days; a second fault that is none."""
    config = TransitionConfig(max_layers_per_step=3, backoff_s=1.0, backoff_max_s=5.0)
    rig = Rig(config=MorphServeConfig(transition=config))
    works = rig.executor.fail
    with caplog.at_level(logging.INFO):
        for num_warnings in (1, 2):  # the second time it is news again: a transition has arrived meanwhile
            rig.executor.fail = fail_prepare(0)  # type: ignore[assignment]
            rig.script.level = 1
            assert len(attempts(rig, 30.0)) > 5
            said = [record for record in caplog.records if "outcome=aborted" in record.getMessage()]
            assert [record.levelname for record in said].count("WARNING") == num_warnings
            assert len(said) == rig.controller.counters.transitions["degrade", "aborted"]
            rig.executor.fail = works
            attempts(rig, 6.0)
            assert rig.controller.level == 1
            rig.go_to(0)
    history = TransitionHistory()
    assert [history.is_news(*each) for each in (
        ("degrade", "aborted", "prepare"), ("degrade", "aborted", "prepare"), ("restore", "aborted", "prepare"),
        ("degrade", "aborted", "rank_timeout"), ("degrade", "cancelled", ""), ("degrade", "aborted", "prepare"),
        ("degrade", "committed", ""), ("degrade", "aborted", "prepare"),
    )] == [True, False, True, True, True, False, True, True]  # fmt: skip


def test_no_first_wait_is_no_leave_to_fail_at_every_step() -> None:
    """Guards: `backoff_s: 0`, whose double is 0 too: a damaged file costs KV and a warning at every step."""
    config = TransitionConfig(max_layers_per_step=3, backoff_s=0.0, backoff_max_s=5.0)
    rig = Rig(config=MorphServeConfig(transition=config))
    rig.executor.fail = fail_prepare(0)  # type: ignore[assignment]
    rig.script.level = 1
    times = attempts(rig, 14.0)
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps == pytest.approx([0.0, 1.0, 2.0, 4.0, 5.0], abs=0.3)


def wake_ups(rig: Rig, seconds: float) -> int:
    """How often an idle engine is woken over so many seconds: it makes no other steps."""
    until_s, num_woken = rig.now_s + seconds, 0
    while rig.now_s < until_s:
        rig.now_s += 0.1
        if rig.controller.wants_wakeup:
            num_woken += 1
            rig.step(seconds=0.0)
        while rig.controller.in_transition:  # as the hooks ask for the next step at once
            rig.step(seconds=0.001)
    return num_woken


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("start", "target"), [(3, 0), (0, 3)])
def test_an_idle_engine_is_woken_for_attempts_and_no_more(num_ranks: int, start: int, target: int) -> None:
    """Guards: a damaged file keeps a core of an idle server busy for ever, ten wake-ups a second; or nobody tries
    again, and it stays where it is once the file is whole."""
    rig = Rig(num_ranks=num_ranks)
    rig.go_to(start)
    rig.executor.fail = lambda command, plan, r: "no file" if command in ("prepare", "alone") else ""
    rig.script.level = target
    rig.step()
    assert wake_ups(rig, 600.0) <= 15  # attempts after 5, 10, 20, 40 seconds, and then one a minute
    assert rig.controller.counters.errors["prepare"] >= 12 and rig.controller.level == start
    rig.executor.fail = lambda command, plan, r: ""
    assert wake_ups(rig, 61.0) and rig.controller.level == target


def test_a_level_that_cannot_be_had_is_not_ahead() -> None:
    """Guards: requests that must not be served at a deeper level wait for as long as the way there keeps failing, while
    all others are served at level 0."""
    rig = Rig()
    rig.executor.fail = fail_prepare(0)  # type: ignore[assignment]
    rig.script.level = 3
    rig.step()
    assert rig.controller.phase is Phase.PREPARING and rig.controller.level_ahead == 3
    rig.step(20)
    assert rig.controller.phase is Phase.IDLE and rig.controller.level_ahead == 0


def test_a_failing_restore_does_not_keep_from_degrading() -> None:
    """Guards: a burst meets a server that waits minutes, because its way back is broken; or a way back that is
    tried at every turn, because degrading works."""
    config = TransitionConfig(max_layers_per_step=3, backoff_s=1.0, backoff_max_s=1000.0)
    rig = Rig(config=MorphServeConfig(transition=config))
    rig.go_to(1)
    works = rig.executor.fail
    rig.executor.fail = fail_prepare(0)  # type: ignore[assignment]
    rig.script.level = 0
    failed = attempts(rig, 40.0)
    assert len(failed) == 6  # at 0, 1, 3, 7, 15 and 31 seconds
    rig.executor.fail = works
    rig.script.level = 2
    attempts(rig, 0.5)
    assert rig.controller.level == 2
    rig.script.level = 1
    assert not attempts(rig, 20.0)
    assert len(attempts(rig, 10.0)) == 1 and rig.controller.level == 1


def test_a_failure_holds_off_the_other_direction_for_a_first_wait() -> None:
    """Guards: ranks that have just failed are asked at the very next step for the way back, and then for the way on."""
    config = TransitionConfig(max_layers_per_step=3, backoff_s=2.0, backoff_max_s=1000.0)
    rig = Rig(config=MorphServeConfig(transition=config))
    rig.go_to(1)
    rig.executor.fail = fail_prepare(0)  # type: ignore[assignment]
    rig.script.level = 0
    assert len(attempts(rig, 1.0)) == 1
    rig.script.level = 2
    assert attempts(rig, 2.0) == pytest.approx([1.0], abs=0.3)


def test_policy_error_fails_and_unfences(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a broken policy kills the engine, leaves a fence, or is asked again."""
    rig = Rig()
    rig.go_to(3)
    assert rig.pool.allocate(1, rig.pool.num_kv_blocks - 1)
    rig.step()
    rig.script.level = 2
    rig.step(2)
    assert rig.pool.fence is not None
    rig.script.error = RuntimeError("broken policy")
    rig.step(20)
    assert rig.controller.health is Health.RESTING and rig.pool.fence is None
    assert rig.controller.counters.errors == {"policy": 1}
    assert caplog.text.count("broken policy") == 1
    rig.script.error = None
    rig.script.level = 0
    rig.pool.finish(1)
    rig.step(20)
    assert rig.controller.level == 3


@pytest.mark.parametrize("after_steps", range(1, 10))
@pytest.mark.parametrize(("start", "target"), [(0, 3), (3, 0)])
def test_policy_error_at_any_step_leaves_pool_and_ranks_agreeing(
    after_steps: int, start: int, target: int
) -> None:
    """Guards: tripping in mid-transition leaves staged layers, or blocks mapped but not published."""
    rig = Rig()
    rig.go_to(start)
    rig.script.level = target
    rig.step(after_steps)
    rig.script.error = RuntimeError("broken policy")
    rig.step(20)
    assert rig.controller.phase is Phase.IDLE and not rig.controller.wants_wakeup
    assert all(rank.staged is None for rank in rig.executor.ranks)
    assert rig.pool.num_kv_blocks == rig.executor.ranks[0].mapped


@pytest.mark.parametrize("level", [-1, 99])
def test_policy_answer_off_the_ladder_fails(level: int) -> None:
    """Guards: an index error half-way through a transition instead of a refusal before it."""
    rig = Rig()
    rig.script.level = level
    rig.step(3)
    assert rig.controller.counters.errors == {"policy": 1} and not rig.executor.sent


def test_monitor_error_fails() -> None:
    """Guards: an error in the monitor reaches the scheduler."""
    rig = Rig()
    rig.monitor.snapshot = lambda *args: 1 / 0  # type: ignore[method-assign,assignment]
    rig.step(3)
    assert rig.controller.counters.errors == {"monitor": 1}


def moves_of(end: Health) -> list[Health]:
    """All from where one may get there."""
    return [health for health in Health if health is not end]


def test_health_never_gets_better() -> None:
    """Guards: a broken policy is asked again, or ranks whose state is unknown are sent commands."""
    moves = {(old, new) for old in Health for new in Health}
    legal = {(Health.RUNNING, Health.RESTING), (Health.RUNNING, Health.DEAD), (Health.RESTING, Health.DEAD)}
    legal |= {(Health.RESTING, Health.RESTING), *((health, Health.LOST) for health in moves_of(Health.LOST))}
    for old, new in legal:
        assert old.to(new) is new
    for old, new in moves - legal:
        with pytest.raises(IllegalTransition, match=f"health: {old.name} -> {new.name}; legal from here: "):
            old.to(new)


def test_every_error_is_a_legal_move() -> None:
    """Guards: an error that the table of `Health` does not know leaves `tick`, or one after the end is counted."""
    rig = Rig()
    controller = rig.controller
    controller._on_level = lambda level: 1 // 0  # type: ignore[assignment,return-value]
    rig.executor.fail = lambda command, plan, r: "lost" if command == "commit" else ""
    rig.script.level = 1
    while controller.health is Health.RUNNING:
        rig.tick()
        if controller.phase is not Phase.COMMITTING:
            rig.executor.run_commands()
    rig.tick()
    assert controller.health is Health.RESTING and controller.counters.errors == {"on_level": 2}
    rig.executor.run_commands()
    rig.tick()
    assert controller.health is Health.LOST
    controller.fail("hooks")
    rig.tick()
    assert controller.counters.errors == {"on_level": 2, "ranks_unknown": 1}


@pytest.mark.parametrize("method", ["prepare", "begin_shrink", "advance_shrink", "finish_shrink", "commit"])
def test_exception_in_a_port_never_leaves_tick(method: str) -> None:
    """Guards: an error below the controller kills the engine, or leaves the tail fenced."""
    rig = Rig()
    rig.go_to(2)
    rig.step()

    def broken(*args: object) -> None:
        raise RuntimeError(method)

    setattr(rig.executor if hasattr(rig.executor, method) else rig.pool, method, broken)
    rig.script.level = 0
    rig.step(20)
    assert rig.controller.counters.errors == {"controller": 1}
    assert rig.pool.fence is None and rig.controller.failed
    assert rig.pool.allocate(1, rig.pool.num_kv_blocks - 1)


def test_on_level_error_fails_and_is_told_again() -> None:
    """Guards: degraded KV is cached as clean because whoever must know of the level was never told."""
    rig = Rig()
    told: list[int] = []

    def fails_once(level: int) -> None:
        told.append(level)
        if len(told) == 1:
            raise RuntimeError("not now")

    rig.controller._on_level = fails_once
    rig.script.level = 1
    rig.step(20)
    assert told[:2] == [told[0]] * 2, "not told again"
    assert rig.controller.counters.errors == {"on_level": 1} and rig.controller.failed


@pytest.mark.parametrize("level", [1, 0])
def test_single_rank_that_cannot_prepare_keeps_the_old_level(level: int) -> None:
    """Guards rule 6 without a vote: KV given up for a switch that failed is lost, or effective level is wrong."""
    rig = Rig(num_ranks=1)
    if level == 0:
        rig.go_to(3)
    before, blocks = rig.controller.level, rig.pool.num_kv_blocks
    rig.executor.fail = lambda command, plan, r: "no memory" if command == "alone" else ""
    rig.script.level = level
    rig.step(6)
    assert rig.controller.level == rig.controller.effective_level == before
    assert rig.pool.num_kv_blocks == blocks and not rig.controller.failed
    assert rig.controller.counters.errors == {"prepare": 1}
    rig.executor.fail = lambda command, plan, r: ""
    rig.go_to(level)


def test_single_rank_may_hold_less_than_the_ladder_counts() -> None:
    """Guards: a clean failure is taken for a half-done one where a kernel keeps less than its bound."""
    rig = Rig(num_ranks=1)
    count = rig.executor._weight_bytes
    rig.executor._weight_bytes = lambda rank: count(rank) - 8 * rank.formats.count("w8")  # type: ignore[method-assign]
    rig.go_to(3)
    rig.executor.fail = lambda command, plan, r: "no memory" if command == "alone" else ""
    rig.script.level = 0
    rig.step(6)
    assert rig.controller.level == 3 and not rig.controller.failed
    assert rig.controller.counters.errors == {"prepare": 1}
