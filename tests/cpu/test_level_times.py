"""Step times that are learned from an engine's steps: they converge from a wrong prior, and stay sound."""

from __future__ import annotations

import pickle
import random
from dataclasses import astuple, replace
from itertools import pairwise

import pytest
from cpu.log_world import LADDER as PLAIN

from policies import EngineLimits, MorphLevel, PolicySetup, Signals, SloConfig, StepLoad, StepTime
from policies.slo import SloPolicy
from policies.slo.times.level_times import _FIRST_STEPS, _PRIOR, LearnedTimes
from policies.slo.times.moves import LearnedMoves, layers_between
from policies.slo.times.ridge import NonNegativeRidge
from policies.slo.times.runs import StepRun
from tests.cpu.test_slo_parts import QUIET

pytestmark = pytest.mark.cpu

FACTORS = (1.0, 0.6, 1.2)  # of the linears, by level: so much faster or slower than level 0's, at every batch


def _ladder() -> tuple[MorphLevel, ...]:
    levels = []
    for index, (formats, factor) in enumerate(zip(("base", "w8", "w4"), FACTORS, strict=True)):
        factors = tuple((batch, factor) for batch in (1, 8, 32))
        levels.append(MorphLevel(index, (formats,) * 4, 4_000_000 >> index, 50 * (index + 1), 0.1 * index, factors))
    return tuple(levels)


LADDER = _ladder()
Parts = tuple[float, ...]
PRIOR_S: Parts = tuple(0.02 * part for part in _PRIOR)


def engine(parts: Parts) -> list[StepTime]:
    """Each level's times on an engine whose level 0 has these parts, in seconds."""
    fixed, linears, seq, seq_linears, prefill, context = parts
    return [StepTime(fixed + f * linears, seq + f * seq_linears, f * prefill, context) for f in FACTORS]


ENGINES = {
    "prior": engine(PRIOR_S),
    "slow": engine(tuple(10 * part for part in PRIOR_S)),
    "fast": engine(tuple(part / 10 for part in PRIOR_S)),
    "gpu": engine((0.003, 0.005, 1e-5, 1e-5, 8e-6, 2e-8)),  # a step of 8 ms, however many share it
    "laptop": engine((0.02, 0.2, 0.01, 0.02, 0.02, 4e-6)),
    **{
        f"part {i} times {by}": engine(tuple(part * (by if i == j else 1) for j, part in enumerate(PRIOR_S)))
        for i in range(len(PRIOR_S))
        for by in (0.1, 10)
    },
    "by turns": engine(tuple(part * (10 if j % 2 else 0.1) for j, part in enumerate(PRIOR_S))),
    "by turns, the others": engine(tuple(part * (0.1 if j % 2 else 10) for j, part in enumerate(PRIOR_S))),
}


def loads(count: int, seed: int = 0, levels: tuple[int, ...] = (0, 0, 1), most: int = 40) -> list[StepLoad]:
    """What steps are made of as bursts come and go; a level holds for some of them."""
    rng, found = random.Random(seed), []
    for at in range(count):
        seqs = max(1, int(most * abs((at % 200) / 100 - 1) * rng.random()))
        prefill = rng.randint(10, 300) if rng.random() < 0.15 else 0
        context = seqs * rng.randint(60, 240) + prefill
        found.append(StepLoad(0.0, seqs, prefill, context, levels[at // 100 % len(levels)]))
    return found


def timed(times: list[StepTime], steps: list[StepLoad], noise: float = 0.07, seed: int = 1) -> list[StepLoad]:
    rng = random.Random(seed)
    return [replace(step, seconds=true_s(times, step) * rng.lognormvariate(0, noise)) for step in steps]


def true_s(times: list[StepTime] | LearnedTimes, step: StepLoad) -> float:
    return times[step.level].seconds(step.num_seqs, step.prefill_tokens, step.context_tokens)


def taught(steps: list[StepLoad]) -> LearnedTimes:
    learned = LearnedTimes(LADDER)
    for step in steps:
        learned.learn(StepRun.of(step))
    return learned


def worst(learned: LearnedTimes, times: list[StepTime], level: int) -> float:
    """The largest relative error over decode steps of 1 to 40 sequences and a prefill."""
    grid = [StepLoad(0, seqs, prefill, 150 * seqs + prefill, level) for seqs in (1, 4, 16, 40) for prefill in (0, 200)]
    return max(abs(true_s(learned, step) / true_s(times, step) - 1) for step in grid)


@pytest.mark.parametrize("name", ENGINES)
def test_a_wrong_prior_is_corrected(name: str) -> None:
    """Guards: predictions of an engine that there is not, because the prior outweighs what is measured."""
    times = ENGINES[name]
    steps = timed(times, loads(3000))
    learned = taught(steps[:600])
    assert worst(learned, times, 0) < 0.25, "after seconds"
    learned = taught(steps)
    assert worst(learned, times, 0) < 0.12 and worst(learned, times, 1) < 0.12


@pytest.mark.parametrize("name", ["prior", "gpu", "laptop"])
def test_level_zero_teaches_the_deeper_ones(name: str) -> None:
    """Guards: a level that must be entered before anything is known of it."""
    learned = taught(timed(ENGINES[name], loads(1500, levels=(0,))))
    assert worst(learned, ENGINES[name], 1) < 0.3 and worst(learned, ENGINES[name], 2) < 0.3


@pytest.mark.parametrize("name", ["prior", "gpu", "laptop"])
@pytest.mark.parametrize("first", [True, False])
def test_stalls_are_no_steps(name: str, first: bool) -> None:
    """Guards: one compilation, one pause of the machine or one clock that jumps, in every prediction for an hour."""
    rng, steps = random.Random(3), timed(ENGINES[name], loads(2000))
    odd = range(0, 6, 3) if first else rng.sample(range(len(steps)), 40)
    for at in odd:
        steps[at] = replace(steps[at], seconds=steps[at].seconds * rng.choice([1e-3, 80.0, 300.0]))
    assert worst(taught(steps), ENGINES[name], 0) < 0.15


def test_no_prediction_before_enough_steps() -> None:
    """Guards: predictions from the prior alone; a slow engine that promises nothing for a minute."""
    learned = LearnedTimes(LADDER)
    for number, step in enumerate(timed(ENGINES["prior"], loads(40)), start=1):
        learned.learn(StepRun.of(step))
        assert learned.is_settled == (number >= _FIRST_STEPS)
    slow, needed = LearnedTimes(LADDER), 0
    for step in timed(ENGINES["laptop"], loads(40)):
        needed += not slow.is_settled
        slow.learn(StepRun.of(step))
    assert 8 <= needed < 20


@pytest.mark.parametrize("seed", range(6))
def test_times_are_above_zero_whatever_came(seed: int) -> None:
    """Guards: a part below zero, which fits the loads that were seen and predicts nonsense for others."""
    rng, learned = random.Random(seed), LearnedTimes(LADDER)
    for _ in range(1500):
        seqs = rng.randint(1, 60)
        prefill, context = rng.choice([0, 0, 500]), rng.randint(0, 9000)
        step = StepLoad(rng.lognormvariate(-4, 2), seqs, prefill, context, rng.randint(0, 2))
        learned.learn(StepRun.of(step))
        assert all(figure > 0 for level in range(3) for figure in astuple(learned[level]))


def test_what_no_step_tells_stays_at_the_prior() -> None:
    """Guards: noise of lone sequences that becomes a price of crowds or of prompts."""
    steps = [StepLoad(0.0, 1, 0, 120, 0)] * 3000
    learned = taught(timed([StepTime(0.14, 0, 0, 0)], steps, noise=0.2))
    fixed, linears, seq, seq_linears, prefill, _ = _PRIOR
    unit_s = learned[0].seconds(1, 0, 120) / (fixed + linears + seq + seq_linears + 120 * _PRIOR[-1])
    assert learned[0].seconds(1, 0, 120) == pytest.approx(0.14, rel=0.08)
    assert learned[0].per_prefill_token_s == pytest.approx(prefill * unit_s, rel=0.1)
    assert learned[0].per_seq_s == pytest.approx((seq + seq_linears) * unit_s, rel=0.2)


def test_a_quiet_hour_forgets_no_burst() -> None:
    """Guards: a night of lone requests after which the morning's burst meets the prior again."""
    times = ENGINES["laptop"]
    alone = [StepLoad(0.0, 1, 0, 150, 0)] * int(3600 / true_s(times, StepLoad(0.0, 1, 0, 150, 0)))
    learned = taught([*timed(times, loads(1500)), *timed(times, alone)])
    assert worst(learned, times, 0) < 0.15


def test_another_machine_is_learned_in_the_end() -> None:
    """Guards: a server that was moved and predicts its first machine for ever."""
    before, after = (engine(tuple(times * part for part in PRIOR_S)) for times in (10, 30))
    learned = taught([*timed(before, loads(6000)), *timed(after, loads(18_000))])
    assert worst(learned, after, 0) < 0.15


def test_state_does_not_grow() -> None:
    """Guards: a controller whose memory, or whose step, depends on uptime."""
    steps = timed(ENGINES["prior"], loads(4000))
    sizes = {len(pickle.dumps(learned._fit)) for learned in (taught(steps[:100]), taught(steps))}
    assert len(sizes) == 1 and taught(steps)._first is None


def test_same_steps_same_times() -> None:
    """Guards: a decision that cannot be replayed."""
    steps = timed(ENGINES["gpu"], loads(500))
    first, second = taught(steps), taught(steps)
    assert [first[level] for level in range(3)] == [second[level] for level in range(3)]


def test_what_was_learned_is_taken_over() -> None:
    """Guards: a reload after which thresholds decide; times of another ladder's levels."""
    old, new, other = taught(timed(ENGINES["laptop"], loads(500))), LearnedTimes(LADDER), LearnedTimes(PLAIN)
    new.take_over(old)
    other.take_over(old)
    assert new.is_settled and new[1] == old[1] and not other.is_settled


def test_a_ladder_without_time_factors() -> None:
    """Guards: a server that could not time its layers."""
    learned = LearnedTimes(PLAIN)
    assert learned[0] == learned[len(PLAIN) - 1]
    for step in timed(ENGINES["slow"], loads(200, levels=(0,))):
        learned.learn(StepRun.of(step))
    assert learned.is_settled and true_s(learned, StepLoad(0, 8, 0, 800, 1)) > 0


def test_the_fit_is_the_least_squares_one() -> None:
    """Guards: an elimination that solves another system; parts at the bound that bend the others."""
    rng, rows = random.Random(5), NonNegativeRidge(3, 0.01, 0.02)
    kept: list[tuple[list[float], float]] = []
    for _ in range(200):
        row = [rng.random(), rng.random(), rng.random()]
        kept.append((row, 2.0 * row[0] - 0.5 * row[1] + 0.7 * row[2]))
        rows.add(*kept[-1], keep=1.0)

    def loss(parts: list[float]) -> float:
        errors = sum((sum(a * b for a, b in zip(row, parts, strict=True)) - target) ** 2 for row, target in kept)
        return errors + 0.01 * sum((part - 1) ** 2 for part in parts)

    found = rows.solve()
    assert found[1] == 0.02 and min(found) >= 0.02
    for i in (0, 2):
        for by in (-1e-3, 1e-3):
            assert loss(found) < loss([part + by * (i == j) for j, part in enumerate(found)])


# ---- the time of a move


def transition(moves: LearnedMoves, start: int, end: int, seconds: float, at_s: float = 100.0) -> None:
    quiet: Signals = replace(QUIET, step_s=0.02)
    moves.watch(replace(quiet, now_s=at_s, level=start, target_level=start))
    moves.watch(replace(quiet, now_s=at_s + seconds / 2, level=start, target_level=end))
    moves.watch(replace(quiet, now_s=at_s + seconds, level=end, target_level=end))


@pytest.mark.parametrize("true_s", [6e-5, 6e-3])
def test_transitions_teach_the_time_of_a_move(true_s: float) -> None:
    """Guards: a guess by bytes on a device that is ten times as fast, or a disk that is ten times as slow."""
    moves = LearnedMoves(LADDER)
    guess = moves.move
    errors = []
    for number in range(20):
        transition(moves, 0, 1, 4 * (true_s + 0.02 / 4), 100.0 * number)
        errors.append(abs(moves.move.degrade_s / true_s - 1))
    assert 0.5 < guess.degrade_s / 6e-4 < 2 and errors[-1] < 0.1 and all(a >= b for a, b in pairwise(errors))
    assert moves.move.restore_s == guess.restore_s, "the way back is another"
    assert layers_between(LADDER)[0][1] == layers_between(LADDER)[1][0] == 4


def test_a_device_is_not_taken_for_a_core() -> None:
    """Guards: a burst in which no level is entered, or for the alarm alone, because the way there looks like 8 s. It
    took an H100 0.6 and 0.95 s for all layers of an 8B, 0.5 s back (docs/results/gpu_h100.md)."""
    ladder = tuple(MorphLevel(i, (fmt,) * 32, 13_958_643_712 >> i, 1000, None) for i, fmt in enumerate(("base", "fp8")))
    quiet = replace(QUIET, step_s=0.008)
    ways = {}
    for beside in (False, True):
        policy = PolicySetup(SloConfig(kind="slo"), None, EngineLimits(16, 256, 8192, beside)).build(ladder)
        assert isinstance(policy, SloPolicy)
        ways[beside] = policy._delay_s(quiet, 1), policy._delay_s(replace(quiet, level=1, target_level=1), 0)
    assert min(ways[False]) > 8
    assert all(0.95 < way < 1.5 for way in ways[True])


def test_a_way_that_turned_teaches_nothing() -> None:
    """Guards: half a transition, or one that waited for a drain, taken for the time of its layers."""
    moves = LearnedMoves(LADDER)
    guess = moves.move
    ways = ((1, 0, 0), (2, 0, 2), (9, 0, 1), (30, 0, 2), (60, 2, 2), (61, 2, 0), (90, 2, 2))
    for now_s, level, target in ways:
        moves.watch(replace(QUIET, now_s=float(now_s), level=level, target_level=target))
    assert moves.move == guess
    transition(moves, 1, 0, 1000.0)
    assert moves.move.restore_s <= 4.01 * guess.restore_s


def test_a_way_that_was_met_half_way_teaches_nothing() -> None:
    """Guards: a server's whole uptime taken for the time of a transition during which the policy was replaced."""
    moves = LearnedMoves(LADDER)
    guess = moves.move
    for now_s, level in ((5000.0, 0), (5001.0, 1)):
        moves.watch(replace(QUIET, now_s=now_s, level=level, target_level=1))
    assert moves.move == guess
