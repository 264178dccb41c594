"""What an engine times that sends a step before it reads the last one: of a prompt's time most is the step's before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from policies import Cohort, EngineLimits, MorphLevel, Signals, StepLoad, StepTime
from policies.config import SloConfig
from policies.slo import SloPolicy
from policies.slo.times.correction import Correction
from policies.slo.times.level_times import CalibratedTimes, LearnedTimes
from policies.slo.times.runs import Runs, StepRun
from policies.step_times import LayerMove

pytestmark = pytest.mark.cpu

LADDER = (
    MorphLevel(0, ("base",) * 32, 14_000_000_000, 2560, 0.0),
    MorphLevel(1, ("fp8",) * 32, 7_500_000_000, 5632, 0.03),
)
TRUE = StepTime(0.004, 1e-5, 2.2e-5, 3e-8)
QUIET = Signals(
    now_s=100.0, level=0, target_level=0, num_kv_blocks=2560, used_kv_blocks=900, num_waiting=0, num_running=16,
    oldest_wait_s=0.0, preemptions=0, preemption_rate=0.0, arrival_rate=0.0, queue_delay_s=0.0, ttft_s=0.0, tpot_s=0.0,
    step_s=0.006, blocks_per_request=80.0, prompt_tokens=1132.0, output_tokens=273.0,
)  # fmt: skip


def policy() -> SloPolicy:
    return SloPolicy(SloConfig(kind="slo"), LADDER, None, EngineLimits(16, 256, 8192, True, sends_ahead=True))


def timed(count: int, shift: float, every: int = 12) -> Iterator[StepLoad]:
    """Steps as they are read: `shift` of a prompt's time stands in the step before it."""
    prefill = [1100 if n % every == every - 1 else 0 for n in range(count + 1)]
    moved = [shift * TRUE.per_prefill_token_s * tokens for tokens in prefill]
    for n in range(count):
        yield StepLoad(TRUE.seconds(16, prefill[n], 14000) - moved[n] + moved[n + 1], 16, prefill[n], 14000, 0)


def run(decides: SloPolicy, count: int = 300, shift: float = 0.9) -> float:
    """Let a policy see steps and nothing else; return when they ended."""
    now_s = 100.0
    for step in timed(count, shift):
        now_s += step.seconds
        decides.decide(replace(QUIET, now_s=now_s, last_step=step))
    return now_s


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.9])
def test_a_prompt_that_is_sent_before_the_last_step_is_read(shift: float) -> None:
    """Guards: trust that never comes back under async scheduling, and prompts learned at a fraction of their time."""
    decides = policy()
    run(decides, 600, shift)
    assert decides.predictions == "learned"
    assert decides.correction.step_sigma < 0.25
    learned = decides._times[0].per_prefill_token_s * decides.correction.factor
    assert learned == pytest.approx(TRUE.per_prefill_token_s, rel=0.4)


@pytest.mark.parametrize(("used", "running"), [(900, 16), (2560, 32)], ids=["fits", "gets in half way"])
def test_a_transition_costs_no_trust(used: int, running: int) -> None:
    """Guards: trust lost in every long transition, by those who are let in before its end."""
    decides = policy()
    now_s = run(decides)
    on_the_way = replace(QUIET, target_level=1, used_kv_blocks=used, num_running=running)
    for _ in range(25):
        now_s += 0.06
        waiting = (Cohort(1, 1132, now_s - 0.01, now_s - 0.01),)
        decides.decide(replace(on_the_way, now_s=now_s, num_waiting=1, waiting=waiting))
        now_s += 0.06
        decides.decide(replace(on_the_way, now_s=now_s))
    assert decides.predictions == "learned"


def test_a_step_of_a_run_is_one_step() -> None:
    """Guards: what no step does without, counted once a run: prompts that seem to take it."""
    times, runs = LearnedTimes(LADDER), Runs()
    for number, step in enumerate(timed(600, 0.5, every=2)):
        few = replace(step, prefill_tokens=step.prefill_tokens and 100 + number % 7 * 100)  # of each its own
        few = replace(few, seconds=TRUE.seconds(few.num_seqs, few.prefill_tokens, few.context_tokens))
        if (ended := runs.add(few)) is not None:
            times.learn(ended)
    for tokens in (0, 100, 1000):
        assert times[0].seconds(16, tokens, 14000) == pytest.approx(TRUE.seconds(16, tokens, 14000), rel=0.1)


def test_few_runs_are_not_enough_and_32_steps_are() -> None:
    """Guards: predictions made of two runs, of which one was a stall; and none while each step has prompts."""
    times, runs = LearnedTimes(LADDER), Runs()
    counts = [0, 0]
    for step in timed(200, 0.0, every=4):
        if not times.is_settled and (ended := runs.add(step)) is not None:
            times.learn(ended)
            counts = [counts[0] + 1, counts[1] + ended.num_steps]
    assert times.is_settled
    assert counts[0] >= 8
    assert 32 <= counts[1] <= 34, "steps count, not runs"
    long = LearnedTimes(LADDER)
    for _ in range(7):
        long.learn(StepRun(1.0, 64, 0, 56000, 0, num_steps=8))
    assert not long.is_settled, "one of seven was a stall, perhaps"


def correction() -> Correction:
    return Correction(CalibratedTimes([TRUE, TRUE], LayerMove(0.01, 0.01)), 2.0, sends_ahead=True)


def learn(found: Correction, *steps: StepLoad | None) -> Correction:
    for step in steps:
        found.learn(replace(QUIET, last_step=step))
    return found


def test_a_step_before_one_that_nobody_times_is_not_judged() -> None:
    """Guards: the first step of a transition, sent beside the last one before it, taken for that one's time."""
    usual, long = (StepLoad(seconds, 16, 0, 14000, 0) for seconds in (0.0046, 0.05))
    quiet = learn(correction(), usual, usual, None, replace(usual), replace(usual))
    stalled = learn(correction(), usual, long, None, replace(usual), replace(usual))
    judged = learn(correction(), usual, long, replace(usual), replace(usual))
    assert stalled.factor == pytest.approx(quiet.factor, rel=0.01)
    assert judged.factor > 1.02 * quiet.factor, "one that another step came after is"


def test_runs_end_at_a_step_without_prompts_at_a_level_and_in_any_case() -> None:
    """Guards: a run of two levels, whose times differ; and steps that are never learned since each has a prompt."""
    runs = Runs()
    decode, prompt = StepLoad(0.1, 2, 0, 50, 0), StepLoad(0.3, 3, 40, 60, 0)
    assert runs.add(decode) is None
    assert runs.add(prompt) is None
    ended = runs.add(decode)
    assert ended is not None
    assert (ended.seconds, ended.num_seqs, ended.prefill_tokens, ended.context_tokens) == (0.4, 5, 40, 110)
    assert ended.predicted_s(TRUE) == pytest.approx(TRUE.seconds(2, 0, 50) + TRUE.seconds(3, 40, 60))
    assert runs.add(replace(prompt, level=1)) is not None
    found = [runs.add(replace(prompt, level=1)) for _ in range(40)]
    assert max(run.num_steps for run in found if run is not None) <= 4
    assert sum(run is not None for run in found) >= 9
    slow = [runs.add(replace(prompt, seconds=0.6)) for _ in range(4)]
    assert all(run is not None for run in slow[1:]), "a run ends where learning would wait for it"


def test_a_prompt_behind_what_nobody_timed_is_left_out() -> None:
    """Guards: prompts learned at what is left of their time, behind each change of the level."""
    runs = Runs()
    decode, prompt = StepLoad(0.1, 2, 0, 50, 0), StepLoad(0.3, 3, 40, 60, 0)
    runs.forget(is_idle=False)
    assert [runs.add(step) for step in (prompt, prompt, decode)] == [None, None, None]
    ended = runs.add(decode)
    assert ended is not None and ended.prefill_tokens == 0, "from a step without prompts on"
    runs.forget(is_idle=False)
    assert any(runs.add(prompt) for _ in range(30)), "not for ever"
    runs.forget(is_idle=True)
    runs.add(prompt)
    alone = runs.add(decode)
    assert alone is not None and alone.prefill_tokens == 40, "nothing was before it that could have taken of its time"


def test_an_engine_that_reads_each_step_first_has_each_judged_at_once() -> None:
    """Guards: less to learn from, and later, where each step has a time of its own."""
    found = Correction(CalibratedTimes([TRUE, TRUE], LayerMove(0.01, 0.01)), 2.0)
    before = found.factor
    learn(found, StepLoad(0.3, 16, 1000, 14000, 0))
    assert found.factor > before
