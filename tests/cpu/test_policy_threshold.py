"""The threshold policy, one situation per test, and its properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import W8_THEN_W4

from morphserve.control.budget import RankBytes
from morphserve.control.ladder import build_ladder
from policies import Ladder, Signals, ThresholdConfig, ThresholdPolicy

pytestmark = pytest.mark.cpu

SIZES = {"base": [1000] * 30, "w8": [500] * 30, "w4": [300] * 30}
LADDER = build_ladder(30, [RankBytes(SIZES, 105)], W8_THEN_W4, 49)  # 49, 72, ... 191 blocks (w8), ... 249 (w4)
QUIET = Signals(
    now_s=100.0, level=0, target_level=0, num_kv_blocks=49, used_kv_blocks=10, num_waiting=0, num_running=2,
    oldest_wait_s=0.0, preemptions=0, preemption_rate=0.0, arrival_rate=1.0, queue_delay_s=0.0, ttft_s=0.1,
    tpot_s=0.03, step_s=0.03, blocks_per_request=6.0,
)  # fmt: skip


def make(mode: str = "default", **fields: object) -> ThresholdPolicy:
    return ThresholdPolicy(
        ThresholdConfig.model_validate({"kind": "threshold", "mode": mode, **fields}), LADDER
    )


def at_level(s: Signals, level: int, **fields: object) -> Signals:
    settled = {"level": level, "target_level": level, "num_kv_blocks": LADDER[level].num_kv_blocks}
    return replace(s, **{**settled, **fields})  # type: ignore[arg-type]


def test_full_cache_degrades_with_a_reason() -> None:
    """Guards: a full cache that nobody acts on, or a log line without figures."""
    decision = make().decide(replace(QUIET, used_kv_blocks=46, num_running=6, num_waiting=1))
    assert decision.level > 0
    assert decision.reason == "kv_usage 0.96 > 0.85, need 54 of 48 blocks"


def test_burst_is_answered_before_the_cache_is_full() -> None:
    """Guards: waiting for usage to rise although the requests that will raise it are here."""
    decision = make().decide(replace(QUIET, used_kv_blocks=20, num_running=6, num_waiting=4))
    assert decision.level >= 2
    assert decision.reason.startswith("expected kv_usage 1.25")


def test_jumps_several_levels_at_once() -> None:
    """Guards: one level per decision while a burst stands in the queue."""
    policy = make()
    decision = policy.decide(replace(QUIET, used_kv_blocks=45, num_running=7, num_waiting=12))
    need = 19 * max(6.0, 45 / 7)
    assert need <= 0.65 * (LADDER[decision.level].num_kv_blocks - 1)
    assert need > 0.65 * (LADDER[decision.level - 1].num_kv_blocks - 1)


def test_growth_is_expected_before_any_request_has_ended() -> None:
    """Guards: at the first burst prompts are taken for all that requests will ever hold."""
    cold = replace(QUIET, blocks_per_request=0.0, used_kv_blocks=30, num_running=6, num_waiting=1)
    assert make().decide(cold).level > 0


def test_preemption_is_a_signal_by_itself() -> None:
    """Guards: thrashing while usage after each preemption looks harmless."""
    policy = make()
    assert policy.decide(QUIET).level == 0
    decision = policy.decide(replace(QUIET, preemptions=1, now_s=100.1))
    assert decision.level == 1
    assert decision.reason.startswith("preempted (1 so far)")


def test_preemptions_before_start_do_not_count() -> None:
    """Guards: a policy loaded late takes old preemptions for new ones."""
    assert make().decide(replace(QUIET, preemptions=7)).level == 0


def test_long_wait_counts_only_while_kv_binds() -> None:
    """Guards: degrading because of max_num_seqs or a long prefill, where more blocks do not help."""
    waits = replace(QUIET, num_waiting=30, oldest_wait_s=3.0)
    assert make().decide(waits).level == 0
    binding = replace(waits, used_kv_blocks=39, num_running=6, num_waiting=1)
    assert make(degrade_above=0.95).decide(binding).reason.startswith("oldest wait 3.00 s > 0.20 s")


def test_draining_tail_is_left_alone() -> None:
    """Guards: a round trip for requests that fit as they are, with nobody behind them."""
    policy = make()
    tail = replace(QUIET, used_kv_blocks=44, num_running=7)
    assert policy.decide(replace(tail, num_waiting=1)).level > 0
    policy = make()
    for i in range(100):
        assert policy.decide(replace(tail, now_s=100.0 + i * 0.05)).level == 0


def test_transition_under_way_is_not_escalated_by_what_it_cures() -> None:
    """Guards: one more level at every step until the first blocks arrive."""
    policy = make()
    busy = replace(QUIET, used_kv_blocks=46, num_running=7, num_waiting=1, oldest_wait_s=0.1)
    first = policy.decide(busy)
    for i in range(1, 20):
        moving = replace(
            busy, now_s=100 + i * 0.05, target_level=first.level, preemptions=i, oldest_wait_s=0.1 + i * 0.05
        )
        assert policy.decide(moving) == first
    large = replace(QUIET, blocks_per_request=15.0, used_kv_blocks=44, num_running=3, num_waiting=1)
    waits = replace(large, target_level=1, oldest_wait_s=1.0)  # 71 blocks are coming, enough for all four
    assert make().decide(waits).level == 1


def test_deepest_useful_level_is_the_end() -> None:
    """Guards: levels that give no more blocks, chosen for their index."""
    ladder = build_ladder(30, [RankBytes(SIZES, 105)], W8_THEN_W4, 49, 100)
    policy = ThresholdPolicy(ThresholdConfig(kind="threshold"), ladder)
    decision = policy.decide(replace(QUIET, used_kv_blocks=48, num_running=9, num_waiting=60))
    assert ladder[decision.level].num_kv_blocks == 100 > ladder[decision.level - 1].num_kv_blocks


def test_w4_only_when_w8_is_not_enough() -> None:
    """Guards: paying for w4 while w8 has room; mode accuracy paying for it at all."""
    load = replace(QUIET, used_kv_blocks=48, num_running=8)
    assert make().decide(replace(load, num_waiting=8)).level <= 6
    assert make().decide(replace(load, num_waiting=60)).level == 6, "w4 for a need that is only expected"
    expected = at_level(replace(QUIET, used_kv_blocks=100, num_running=22, blocks_per_request=8.0), 6)
    assert make().decide(expected).level == 6
    held = at_level(replace(QUIET, used_kv_blocks=176, num_running=22, num_waiting=3), 6)
    assert 6 < make().decide(held).level < 12, "no further into w4 than what is held asks for"
    waits = at_level(replace(QUIET, used_kv_blocks=150, num_running=20, num_waiting=9, oldest_wait_s=0.5), 6)
    assert make().decide(waits).level >= 6
    assert make("performance").decide(replace(load, num_waiting=60)).level > 6
    assert make("accuracy").decide(replace(load, num_waiting=60)).level == 6
    assert make("accuracy").decide(held).level == 6


def test_modes_differ_in_the_way_they_say() -> None:
    """Guards: performance that is not deeper and earlier than default, default than accuracy."""
    load = replace(QUIET, used_kv_blocks=46, num_running=7, num_waiting=2)
    levels = [make(mode).decide(load).level for mode in ("accuracy", "default", "performance")]
    assert levels == sorted(levels) and len(set(levels)) == 3
    early = replace(QUIET, used_kv_blocks=36, num_running=6, num_waiting=0)
    policies = [make(mode) for mode in ("accuracy", "default", "performance")]
    for policy in policies:
        policy.decide(replace(QUIET, num_waiting=1, now_s=99.9))
    assert [policy.decide(early).level > 0 for policy in policies] == [False, False, True]


def run_quiet(policy: ThresholdPolicy, s: Signals, seconds: float, level: int) -> tuple[int, float]:
    """Follow the policy for a while; (level, seconds until it last changed)."""
    changed = 0.0
    for i in range(round(seconds / 0.1)):
        wanted = policy.decide(at_level(s, level, now_s=s.now_s + i * 0.1)).level
        if wanted != level:
            level, changed = wanted, i * 0.1
    return level, changed


def test_restores_after_the_dwell_several_levels_at_once() -> None:
    """Guards: one level per dwell, or a restore before the dwell is over."""
    level, seconds = run_quiet(make(), QUIET, 5.0, 6)
    assert (level, seconds) == (0, pytest.approx(2.0))


def test_restores_only_as_far_as_the_load_fits() -> None:
    """Guards: restoring into the next degrade."""
    level, _ = run_quiet(make(), replace(QUIET, used_kv_blocks=55, num_running=9), 30.0, 6)
    assert 0.60 * (LADDER[level].num_kv_blocks - 1) >= 55
    assert 0.60 * (LADDER[level - 1].num_kv_blocks - 1) < 55


@pytest.mark.parametrize("trouble", [{"preemptions": 1}, {"num_waiting": 1, "oldest_wait_s": 1.0}])
def test_trouble_starts_the_dwell_anew(trouble: dict[str, object]) -> None:
    """Guards: a dwell that counts time before the last preemption or the last queue."""
    policy = make(max_level=6)
    for i in range(40):
        now = 100.0 + i * 0.1
        extra = trouble if i == 15 else ({"preemptions": 1} if "preemptions" in trouble and i > 15 else {})
        level = policy.decide(at_level(QUIET, 6, now_s=now, **extra)).level
        assert level == (6 if i < 36 else 0), i


def test_level_between_old_and_new_has_not_rested() -> None:
    """Guards: a jump that is taken back at the next step, since the level above had long fitted."""
    policy = make("performance")
    for i in range(100):
        assert policy.decide(replace(QUIET, now_s=100.0 + i * 0.1)).level == 0
    level = policy.decide(replace(QUIET, now_s=110.0, used_kv_blocks=36, num_running=6, num_waiting=1)).level
    fits = [0.4 * (row.num_kv_blocks - 1) >= 36 for row in LADDER]
    assert fits[level - 1], "the load must be one that the level above holds, too"
    busy = at_level(QUIET, level, now_s=110.1, used_kv_blocks=36, num_running=6)
    assert policy.decide(busy).level == level


def test_arrivals_that_fit_do_not_stop_a_restore() -> None:
    """Guards: steady light traffic holds the server at a deep level for ever."""
    policy = make()
    levels = []
    for i in range(60):
        waiting = 1 if i % 3 == 0 else 0
        s = at_level(QUIET, 6, now_s=100.0 + i * 0.1, num_waiting=waiting, oldest_wait_s=0.03 * waiting)
        levels.append(policy.decide(s).level)
    assert levels[-1] == 0


def test_level_above_max_level_is_left() -> None:
    """Guards: a limit that only holds on the way down."""
    assert make(max_level=2).decide(at_level(QUIET, 6)).level == 2


def test_early_restores_make_the_dwell_grow_and_quiet_makes_it_shrink() -> None:
    """Guards: a load that swings drags the level along, or one bad hour slows restores for ever."""
    policy = make()
    now, level, dwells = 0.0, 0, []
    busy = replace(QUIET, used_kv_blocks=47, num_running=8, num_waiting=2)
    for _ in range(5):
        level = policy.decide(at_level(busy, level, now_s=now)).level
        dwells.append(policy.dwell.seconds)
        while level > 0:
            now += 0.1
            level = policy.decide(at_level(QUIET, level, now_s=now, used_kv_blocks=0, num_running=0)).level
        now += 1.0
    assert dwells == [2.0, 4.0, 5.0, 5.0, 5.0]
    for _ in range(3):
        now += 200.0
        policy.decide(at_level(QUIET, 1, now_s=now))
    assert policy.dwell.seconds == 2.0


def slow_ladder(w8: float, w4: float) -> Ladder:
    """`LADDER`, in which all layers in a format take so many times what level 0 takes with 9 sequences or more."""
    share = {"base": 1.0, "w8": w8, "w4": w4}
    return tuple(
        replace(level, time_factors=((8, 0.5), (32, sum(share[fmt] for fmt in level.layer_formats) / 30)))
        for level in LADDER
    )


def make_on(ladder: Ladder, mode: str = "default") -> ThresholdPolicy:
    return ThresholdPolicy(ThresholdConfig.model_validate({"kind": "threshold", "mode": mode}), ladder)


@pytest.mark.parametrize("mode", ["default", "performance"])
def test_slow_levels_wait_until_no_blocks_are_left(mode: str) -> None:
    """Guards: time per token given for blocks that nobody needs yet; a full cache at a level that has no more."""
    expected = replace(QUIET, used_kv_blocks=30, num_running=12, num_waiting=30)
    slow = slow_ladder(w8=2.0, w4=1.9)
    assert make_on(LADDER, mode).decide(expected).level > 0, "the load must be one that asks for more"
    assert make_on(slow, mode).decide(expected).level == 0
    held = replace(expected, used_kv_blocks=46)
    assert make_on(slow, mode).decide(held).level == 1, "no further than what is held asks for"
    policy = make_on(slow, mode)
    policy.decide(replace(expected, num_waiting=0))
    assert policy.decide(replace(expected, num_waiting=0, preemptions=1, now_s=100.1)).level == 1, "seen, not predicted"
    few = replace(expected, num_running=8)
    assert make_on(slow, mode).decide(few).level > 0, "it is not slow with so few sequences"


def test_a_slow_format_stops_only_the_levels_that_are_slow() -> None:
    """Guards: performance that stays above W4 where only half of its levels cost time, or above a fast format behind a
    slow one."""
    load = replace(QUIET, used_kv_blocks=40, num_running=12, num_waiting=60)
    deepest = len(LADDER) - 1
    assert make_on(slow_ladder(w8=0.6, w4=1.0), "performance").decide(load).level == deepest
    assert make_on(slow_ladder(w8=0.6, w4=1.05), "performance").decide(load).level == deepest, "within the scatter"
    some = make_on(slow_ladder(w8=0.6, w4=1.5), "performance").decide(load).level
    assert 6 < some < deepest, "the last level at which W8's layers still pay for W4's"
    assert make_on(slow_ladder(w8=2.0, w4=0.6), "performance").decide(load).level == deepest


def test_slow_levels_are_left_early() -> None:
    """Guards: a tail served at a level that costs time, although the one above has held it for the whole dwell."""
    tail = replace(QUIET, used_kv_blocks=33, num_running=12, blocks_per_request=2.8)  # 0.7 of level 0's blocks
    assert run_quiet(make_on(LADDER), tail, 5.0, 3)[0] == 1, "the load must be one for which restore_below says no"
    assert run_quiet(make_on(slow_ladder(w8=2.0, w4=1.9)), tail, 5.0, 3)[0] == 0


counts = st.integers(0, 60)
ladders = st.sampled_from([LADDER, slow_ladder(2.0, 1.9), slow_ladder(0.6, 1.5), slow_ladder(2.0, 0.6)])
any_signals = st.builds(
    lambda dt, used, waiting, running, wait, preempted, per_request, step: (
        dt, {"num_waiting": waiting, "num_running": running, "oldest_wait_s": wait if waiting else 0.0,
             "blocks_per_request": per_request, "step_s": step}, used, preempted,
    ),
    st.floats(0.001, 3.0), st.floats(0, 1), counts, counts, st.floats(0, 10), st.booleans(), st.floats(0, 30),
    st.floats(0, 0.5),
)  # fmt: skip


def drive(
    policy: ThresholdPolicy, history: list[tuple[float, dict[str, object], float, bool]]
) -> list[Signals]:
    """Follow every decision at once; the signals the policy saw."""
    level, now, preemptions, seen = 0, 100.0, 0, []
    for dt, fields, fraction, preempted in history:
        now += dt
        preemptions += preempted
        used = round(fraction * (LADDER[level].num_kv_blocks - 1))
        s = at_level(QUIET, level, now_s=now, used_kv_blocks=used, preemptions=preemptions, **fields)
        seen.append(s)
        level = policy.decide(s).level
        assert 0 <= level <= policy.thresholds.max_level
    return seen


@given(st.lists(any_signals, max_size=40), st.sampled_from(["accuracy", "default", "performance"]), ladders)
@settings(deadline=None)
def test_decisions_stay_on_the_ladder_and_repeat(
    history: list, mode: str, ladder: Ladder  # type: ignore[type-arg]
) -> None:  # fmt: skip
    """Guards: an index off the ladder; a replay that decides otherwise than the live run."""
    seen = drive(make_on(ladder, mode), history)
    first, second = make_on(ladder, mode), make_on(ladder, mode)
    assert [first.decide(s) for s in seen] == [second.decide(s) for s in seen]


@given(st.lists(any_signals, max_size=15), st.integers(0, 190), st.integers(0, 190), counts, counts, ladders)
@settings(deadline=None)
def test_more_usage_never_means_a_shallower_level(
    history: list, used: int, more: int, waiting: int, running: int, ladder: Ladder  # type: ignore[type-arg]
) -> None:  # fmt: skip
    """Guards: a threshold with the wrong sign, or a regime test that a fuller cache passes."""
    seen = drive(make_on(ladder), history)
    last = seen[-1] if seen else QUIET
    levels = []
    for blocks in (min(used, more), max(used, more)):
        policy = make_on(ladder)
        level = 0
        for s in seen:
            level = policy.decide(s).level
        blocks = min(blocks, LADDER[level].num_kv_blocks - 1)
        s = at_level(
            last, level, now_s=last.now_s + 0.05, used_kv_blocks=blocks, num_waiting=waiting,
            num_running=running, oldest_wait_s=0.1 if waiting else 0.0,
        )  # fmt: skip
        levels.append(policy.decide(s).level)
    assert levels[0] <= levels[1]


@given(st.integers(0, 28), st.integers(0, 4), st.floats(0.001, 1.0), st.sampled_from(["accuracy", "default"]))
def test_quiet_never_leaves_level_zero(used: int, running: int, dt: float, mode: str) -> None:
    """Guards: morphing without need."""
    policy = make(mode)
    s = replace(QUIET, used_kv_blocks=used if running else 0, num_running=running)
    assert all(policy.decide(replace(s, now_s=100 + i * dt)).level == 0 for i in range(50))


@given(
    st.lists(any_signals, min_size=5, max_size=80), st.sampled_from(["accuracy", "default", "performance"])
)
@settings(deadline=None)
def test_restores_are_a_dwell_apart_from_pressure(history: list, mode: str) -> None:  # type: ignore[type-arg]
    """Guards: flip-flop: down, up and down again within a dwell."""
    policy = make(mode)
    level, last_degrade = 0, float("-inf")
    for s in drive(make(mode), history):
        wanted = policy.decide(s).level
        if wanted > level:
            last_degrade = s.now_s
        elif wanted < level:
            assert s.now_s - last_degrade >= policy.dwell.seconds
        level = wanted
