"""The controller's way through swap batches and phases, one story per test."""

from __future__ import annotations

import logging

import pytest

from morphserve.config import KVConfig, MorphServeConfig, TransitionConfig
from morphserve.control import Controller, EngineView, Phase, Plan
from morphserve.control.budget import RankBytes
from morphserve.control.transition import check_move
from morphserve.errors import ConfigError, IllegalTransition
from policies import PolicySetup, StaticConfig, StaticPolicy
from tests.fakes import BASE_BLOCKS, LAYER_BYTES, Rig

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("immediate", [False, True])
def test_every_level_and_back(immediate: bool) -> None:
    """Guards: a level that is not reached exactly, or a way back that leaves bytes behind."""
    rig = Rig(immediate=immediate)
    for level in (1, 6, 3, 5, 0):
        rig.go_to(level)
        expected = rig.ladder[level]
        assert tuple(rig.executor.ranks[1].formats) == expected.layer_formats
        assert rig.pool.num_kv_blocks == expected.num_kv_blocks == rig.executor.ranks[0].mapped
        assert rig.ledger["weights"] == expected.weight_bytes
        assert rig.ledger["kv_blocks"] == expected.num_kv_blocks * rig.ledger.kv_block_bytes
        assert rig.ledger["staging"] == 0
    assert rig.controller.counters.transitions == {("degrade", "committed"): 3, ("restore", "committed"): 2}
    assert not rig.controller.wants_wakeup


def test_nobody_is_woken_to_ask_a_policy_that_never_changes_its_mind() -> None:
    """Guards: an idle server that is quantized for good keeps a core busy for ever."""
    rig = Rig()
    rig.script.level = 3
    rig.step(40)
    assert rig.controller.level == 3 and rig.controller.wants_wakeup, "this one may want to restore"
    config = StaticConfig(kind="static", level=5)
    rig.controller.replace_policy(StaticPolicy(config, rig.ladder), "edited", PolicySetup(config))
    assert rig.controller.wants_wakeup
    rig.step(1)
    assert rig.controller.level == 3 and rig.controller.wants_wakeup, "it is not there yet"
    rig.step(40)
    assert rig.controller.level == 5 and not rig.controller.wants_wakeup


def test_blocks_are_published_only_after_all_ranks_replied() -> None:
    """Guards rule 1: the pool grows when commit is sent, not when it is answered."""
    rig = Rig()
    rig.executor.delay = lambda: 2
    rig.script.level = 1
    rig.step(4)
    assert rig.executor.sent[-1][0] == "commit"
    rig.step(2)
    assert rig.pool.num_kv_blocks == BASE_BLOCKS
    rig.step(1)
    assert rig.pool.num_kv_blocks > BASE_BLOCKS


def test_a_rank_that_maps_less_decides() -> None:
    """Guards rule 1: publishing what was planned instead of the minimum that is mapped."""
    rig = Rig()
    rig.executor.map_at_most = BASE_BLOCKS + 3
    rig.go_to(2)
    assert rig.pool.num_kv_blocks == BASE_BLOCKS + 3
    assert rig.controller.counters.short_grows > 0
    rig.executor.map_at_most = None
    rig.go_to(0)
    assert rig.pool.num_kv_blocks == BASE_BLOCKS


def test_blocks_that_had_no_memory_are_asked_for_again_at_rest(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a level that keeps the blocks it got in a bad moment for as long as it lasts; a line for each attempt."""
    rig = Rig()
    rig.executor.map_at_most = BASE_BLOCKS + 3
    rig.go_to(4)  # by several swap batches, none of which gets more
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    rig.go_to(2)
    warnings, sent, short = len(caplog.records), len(rig.executor.sent), rig.controller.counters.short_grows
    rig.step(20 * 60 * 5)  # five minutes
    assert len(rig.executor.sent) - sent == 7  # after 5, 10, 20, 40 and then each 60 s
    assert all(plan.layer_formats == () and plan.copies == () for _, plan in rig.executor.sent[sent:])
    assert len(caplog.records) == warnings and rig.pool.num_kv_blocks == BASE_BLOCKS + 3
    assert rig.controller.counters.short_grows == short, "of levels that were short, not of attempts"
    rig.executor.map_at_most = BASE_BLOCKS + 5
    rig.step(20 * 61)
    assert rig.pool.num_kv_blocks == BASE_BLOCKS + 5
    rig.executor.map_at_most = None
    rig.step(20 * 61)
    sent = len(rig.executor.sent)
    assert rig.pool.num_kv_blocks == rig.ladder[2].num_kv_blocks
    rig.step(20 * 61)
    assert len(rig.executor.sent) == sent and rig.controller.phase is Phase.IDLE
    rig.go_to(0)


def test_nothing_is_asked_for_again_after_an_error_of_the_policy() -> None:
    """Guards: a controller at rest for good that goes on moving."""
    rig = Rig()
    rig.executor.map_at_most = BASE_BLOCKS + 3
    rig.go_to(2)
    rig.script.error = RuntimeError("broken")
    rig.executor.map_at_most = None
    rig.step(20 * 60)
    assert rig.controller.failed and rig.pool.num_kv_blocks == BASE_BLOCKS + 3


def test_batches_respect_layers_per_step() -> None:
    """Guards: a level of three layers switched in one gap although two are allowed."""
    rig = Rig()
    rig.go_to(6)
    sizes = [len(plan.layer_formats) for command, plan in rig.executor.sent if command == "prepare"]
    assert max(sizes) == 2 and sum(sizes) == 16


def test_slow_layers_make_small_batches() -> None:
    """Guards: the pause limit ignored once the cost of a layer is known."""
    config = MorphServeConfig(transition=TransitionConfig(max_layers_per_step=3, max_pause_ms=30))
    rig = Rig(config=config)
    rig.executor.seconds_per_layer = 0.014  # prepare + commit: 28 ms a layer
    rig.go_to(2)
    sizes = [len(plan.layer_formats) for command, plan in rig.executor.sent if command == "prepare"]
    assert sizes == [3, 1, 1, 1]


def test_batches_in_the_background_are_as_large_as_the_reserve() -> None:
    """Guards: on a GPU a level in small pieces, between which steps run pieces, for a pause that nobody sees."""
    config = MorphServeConfig(transition=TransitionConfig(max_layers_per_step=3, max_pause_ms=1))
    rig = Rig(config=config)
    rig.executor.in_background = True
    rig.executor.seconds_per_layer = 0.5
    rig.go_to(2)
    sizes = [len(plan.layer_formats) for command, plan in rig.executor.sent if command == "prepare"]
    assert sizes == [3, 3]


def test_the_first_batch_goes_by_bytes() -> None:
    """Guards: five layers of a large model in the first gap, because none has been measured yet."""
    rig = Rig()
    largest = max(max(sizes) for fmt, sizes in rig.ranks[0].layers.items() if fmt != "base")
    config = MorphServeConfig(
        transition=TransitionConfig(max_layers_per_step=3, max_pause_ms=1000 * 2.5 * largest / 0.6e9)
    )
    rig = Rig(config=config)
    rig.go_to(2)
    sizes = [len(plan.layer_formats) for command, plan in rig.executor.sent if command == "prepare"]
    assert sizes[0] == 2


def test_one_batch_per_gap_even_when_answers_come_at_once() -> None:
    """Guards: an executor in the same process makes the controller switch everything in one pause."""
    rig = Rig(immediate=True)
    rig.script.level = 6
    rig.step()
    assert [command for command, _ in rig.executor.sent] == ["prepare", "commit"]


def test_shrink_moves_live_blocks_in_the_same_step() -> None:
    """Guards rule 5: copies sent a step late, or unmapping blocks that are in use."""
    rig = Rig()
    rig.go_to(6)
    assert rig.pool.allocate(1, 10)
    assert max(rig.pool.held[1]) > BASE_BLOCKS
    rig.step()
    rig.go_to(0)
    assert max(rig.pool.held[1]) < BASE_BLOCKS
    assert any(plan.copies for _, plan in rig.executor.sent)


def test_copies_are_bounded_per_step_and_drained() -> None:
    """Guards: more live blocks moved per step than configured, or replies left on the ring."""
    config = MorphServeConfig(
        kv=KVConfig(migrate_blocks_per_step=1), transition=TransitionConfig(max_layers_per_step=8)
    )
    rig = Rig(config=config, layers_per_level=8)  # one swap batch, so that all moves belong to one drain
    rig.go_to(1)
    assert rig.pool.allocate(1, 15)
    rig.step()
    rig.executor.delay = lambda: 12  # the fake asserts that never more than ten are under way
    rig.go_to(0, steps=2000)
    assert max(len(plan.copies) for _, plan in rig.executor.sent) == 1
    rig.step(20)
    assert rig.executor.num_undrained == 0


def test_new_burst_turns_a_drain_around_at_once() -> None:
    """Guards: a restore that cannot be stopped keeps the fence up while requests wait."""
    rig = Rig()
    rig.go_to(3)
    blocks = rig.pool.num_kv_blocks
    assert rig.pool.allocate(1, blocks - 1)
    rig.step()
    rig.script.level = 2
    rig.step(3)
    assert rig.controller.phase is Phase.DRAINING
    rig.script.level = 4
    rig.step()
    assert rig.pool.fence is None
    assert rig.controller.phase is Phase.PREPARING
    rig.go_to(4)
    assert rig.controller.counters.transitions[("restore", "cancelled")] == 1


@pytest.mark.parametrize("after_steps", range(1, 8))
def test_turning_around_at_any_step_of_a_restore(after_steps: int) -> None:
    """Guards: blocks unmapped for a switch that no longer happens are never given back."""
    rig = Rig()
    rig.go_to(3)
    rig.script.level = 0
    rig.step(after_steps)
    rig.go_to(3)
    assert rig.pool.num_kv_blocks == rig.ladder[3].num_kv_blocks


@pytest.mark.parametrize(("phase", "commands"), [("SHRINKING", []), ("PREPARING", ["abort"])])
def test_turning_around_before_the_switch_switches_nothing(phase: str, commands: list[str]) -> None:
    """Guards: layers brought back only to be replaced again, while a burst waits."""
    rig = Rig()
    rig.go_to(3)
    rig.script.level = 2
    while rig.controller.phase.name != phase:
        rig.step()
    at_turn = len(rig.executor.sent)
    rig.go_to(3)
    after = rig.executor.sent[at_turn:]
    assert [command for command, plan in after if plan.layer_formats] == commands
    assert rig.pool.num_kv_blocks == rig.ladder[3].num_kv_blocks


def test_staging_reserve_bounds_a_batch() -> None:
    """Guards rule 4: more layers staged at once than the budget has room for."""
    largest: dict[int | None, int] = {}
    for reserve in (660, None):  # one layer's w8; the default: two layers', as max_layers_per_step allows
        rig = Rig(staging_bytes=reserve)
        rig.go_to(6)
        rig.go_to(0)
        restores = [plan.layer_formats for command, plan in rig.executor.sent if command == "prepare"]
        largest[reserve] = max(len(layers) for layers in restores if layers[0][1] == "base")
    assert largest == {660: 1, None: 2}


def test_exposure_is_the_deeper_level_between_two() -> None:
    """Guards: tokens made with degraded layers are counted as full precision."""
    rig = Rig()
    rig.go_to(1)
    rig.go_to(0)
    assert rig.levels == [1, 0]
    degraded = next(i for i, (command, plan) in enumerate(rig.executor.sent) if command == "commit")
    assert rig.executor.sent[degraded][1].layer_formats


def test_info_lines_only_at_start_and_end(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a line per swap batch floods the log."""
    rig = Rig()
    with caplog.at_level(logging.INFO):
        rig.go_to(6)
    assert [record.getMessage() for record in caplog.records][0] == "morph r1: level 0 -> 6 (script wants 6)"
    assert len(caplog.records) == 2
    assert caplog.records[1].getMessage().startswith("morph r1: direction=degrade outcome=committed ")
    assert "num_layers=16 format=w4" in caplog.records[1].getMessage()


def test_status_is_plain() -> None:
    """Guards: a status that json cannot write."""
    import json

    rig = Rig()
    rig.go_to(2)
    status = json.loads(json.dumps(rig.controller.status()))
    assert status["level"] == 2 and status["ranks"]["1"]["num_kv_blocks"] == rig.pool.num_kv_blocks
    assert status["layers_by_format"] == {"w8": 6, "base": 2}
    assert status["counters"]["transitions"] == {"degrade_committed": 1}


def test_contradicting_inputs_are_refused() -> None:
    """Guards: a ladder made from other bytes overdraws the memory at the first transition."""
    rig = Rig()
    sizes = {**LAYER_BYTES, "w8": [1] * 8}
    for layer_bytes, blocks in ((sizes, BASE_BLOCKS), (LAYER_BYTES, BASE_BLOCKS + 1)):
        rig.pool.num_kv_blocks = blocks
        with pytest.raises(ConfigError):
            Controller(
                rig.ladder, rig.script, rig.pool, rig.executor, rig.monitor, rig.config, rig.ledgers,
                ranks=[RankBytes(layer_bytes, 130)], clock=lambda: 0.0,
            )  # fmt: skip


def test_illegal_moves_are_refused() -> None:
    """Guards: a state machine that takes any move."""
    assert check_move(1, Phase.IDLE, Phase.DRAINING) is Phase.DRAINING
    with pytest.raises(IllegalTransition, match="IDLE -> ABORTING; legal from here: COMMITTING, DRAINING, PREPARING"):
        check_move(1, Phase.IDLE, Phase.ABORTING)


def test_ticks_cost_and_keep_the_same_after_long_use() -> None:
    """Guards rule 7: something grows with the number of steps."""
    rig = Rig(immediate=True)
    rig.executor.keep_sent = False
    view = EngineView(0, 1, 0.0)

    def run(ticks: int) -> None:
        for i in range(ticks):
            rig.now_s += 0.01
            rig.script.level = (i // 50) % 7
            rig.controller.tick(view)
            rig.executor.num_undrained  # noqa: B018  forgets taken tickets

    def size_of(thing: object, depth: int = 0) -> int:
        if depth > 6 or isinstance(thing, (str, bytes, int, float, type(None))):
            return 0
        parts: list[object] = []
        if isinstance(thing, dict):
            parts = list(thing.values())
        elif isinstance(thing, (list, tuple, set)):
            parts = list(thing)
        else:
            names = [*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())]
            parts = [getattr(thing, name, None) for name in names]
        return len(parts) + sum(size_of(part, depth + 1) for part in parts)

    run(2_100)
    before = size_of(rig.controller)
    run(99_750)  # whole rounds of 350 ticks, so both ends stand at the same place
    assert size_of(rig.controller) == before
    assert not rig.controller.failed


def test_plans_carry_rising_revisions() -> None:
    """Guards: a rank refuses a plan because its revision was used before."""
    rig = Rig()
    rig.go_to(3)
    rig.go_to(0)
    revisions = [plan.revision for command, plan in rig.executor.sent if command != "commit"]
    assert revisions == sorted(set(revisions))
    assert all(isinstance(plan, Plan) for _, plan in rig.executor.sent)


def test_single_rank_switches_in_one_command() -> None:
    """Guards: a vote of one, which costs a step per swap batch and makes the burst wait."""
    rig = Rig(num_ranks=1)
    rig.go_to(6)
    assert rig.pool.allocate(1, 12)
    rig.step()
    rig.go_to(0)
    commands = {command for command, plan in rig.executor.sent if plan.layer_formats}
    assert commands == {"alone"}
    assert rig.executor.ranks[0].formats == ["base"] * 8


def test_the_last_transitions_are_told_and_no_more() -> None:
    """Guards: a status that cannot say why the level is what it is, or a list that grows with uptime."""
    rig = Rig()
    rig.go_to(2)
    blocks = rig.pool.num_kv_blocks
    rig.go_to(0)
    restore, degrade = rig.controller.status()["recent_transitions"]
    assert (degrade["from_level"], degrade["to_level"], degrade["outcome"]) == (0, 2, "committed")
    assert (restore["from_level"], restore["to_level"], restore["direction"]) == (2, 0, "restore")
    assert degrade["kv_blocks_gained"] == blocks - BASE_BLOCKS == -restore["kv_blocks_gained"] > 0
    assert degrade["reason"] == "script wants 2" and 0 < degrade["seconds"] < degrade["ended_ago_s"]
    rig.now_s += 100
    assert rig.controller.status()["recent_transitions"][0]["ended_ago_s"] == pytest.approx(
        100 + restore["ended_ago_s"]
    )
    for _ in range(15):
        rig.go_to(1)
        rig.go_to(0)
    told = rig.controller.status()["recent_transitions"]
    assert len(told) == 20 and [row["to_level"] for row in told[:4]] == [0, 1, 0, 1]


def test_an_aborted_transition_is_told_with_its_error() -> None:
    """Guards: the list shows what went well, and an operator looks for the rest in the log."""
    rig = Rig()
    rig.executor.fail = lambda command, plan, rank: "no memory" if command == "prepare" else ""
    rig.script.level = 1
    rig.step(10)
    (row,) = rig.controller.status()["recent_transitions"]
    assert (row["outcome"], row["from_level"], row["to_level"], row["num_layers"]) == ("aborted", 0, 0, 0)
    assert "no memory" in row["error"]
