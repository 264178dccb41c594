"""What the tests of decision logs share: bursts as a policy sees them, and logs of what it answered."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from levels import W8_THEN_W4

from morphserve.control import DecisionLog, make_header
from morphserve.control.budget import RankBytes
from morphserve.control.decisions.decision_log import Row
from morphserve.control.decisions.replay_log import LogError, Replay, read_log
from morphserve.control.ladder import build_ladder
from policies import (
    Cohort,
    Decision,
    EngineLimits,
    LayerMove,
    Policy,
    PolicySetup,
    Signals,
    SloConfig,
    StaticConfig,
    StepLoad,
    StepTime,
    StepTimes,
    ThresholdConfig,
)

LADDER = build_ladder(6, [RankBytes({"base": [1000] * 6, "w8": [500] * 6, "w4": [300] * 6}, 100)], W8_THEN_W4, 20)
LIMITS = EngineLimits(32, 16, 2048)
TIMES = StepTimes(
    {
        "base": StepTime(0.012, 0.0004, 0.00025, 1.2e-6),
        "w8": StepTime(0.007, 0.0003, 0.00015, 1.2e-6),
        "w4": StepTime(0.008, 0.0003, 1 / 3000, 1.2e-6),
    },
    LayerMove(0.0015, 0.0018),
)
THRESHOLD = PolicySetup(ThresholdConfig(kind="threshold", restore_after_s=0.3), None, LIMITS)
SLO = PolicySetup(SloConfig(kind="slo", ttft_s=0.5), TIMES, LIMITS)
LEARNED = PolicySetup(SloConfig(kind="slo", ttft_s=0.5), None, LIMITS)
STATIC = PolicySetup(StaticConfig(kind="static", level="w8"))
SETUPS = {"threshold": THRESHOLD, "slo": SLO, "learned": LEARNED, "static": STATIC}


def load(seed: int, count: int) -> list[Signals]:
    """Bursts as a policy sees them, steps that are equal but not the same included."""
    rng = random.Random(seed)
    found, now, level, preemptions, arrivals = [], 1000.0, 0, 0, 0
    waiting: tuple[Cohort, ...] = ()
    step: StepLoad | None = None
    for i in range(count):
        now += rng.expovariate(20)
        busy = i // 60 % 2
        if rng.random() < 0.3:
            arrivals += 3 * busy
            waiting = tuple(
                Cohort(rng.randint(1, 3), rng.randint(10, 400), now - rng.random(), now, rng.choice([None, 0.7]))
                for _ in range(rng.randint(0, 3) * busy)
            )
        if rng.random() < 0.7:  # else the step of before stands in the signals again
            step = StepLoad(rng.choice([0.02, 0.3]), 4, 0, 100, level)
        preemptions += busy and rng.random() < 0.05
        if rng.random() < 0.1:
            level = rng.randrange(len(LADDER))
        blocks = LADDER[level].num_kv_blocks
        found.append(
            Signals(
                now, level, level, blocks, int((blocks - 1) * (0.3 + 0.65 * busy)),
                sum(c.num_requests for c in waiting), 4 + 3 * busy, rng.random() * busy, int(preemptions),
                *(rng.random() for _ in range(6)), 2 + rng.random(), waiting, step, 80.0, 30.0, arrivals,
            )
        )  # fmt: skip
    return found


def write(path: Path, setup: PolicySetup, signals: list[Signals]) -> list[Decision]:
    """What a server that ends in order leaves."""
    log = DecisionLog(path, make_header(setup, LADDER))
    policy = setup.build(LADDER)
    decisions = ask(log, policy, signals)
    log.close()
    assert log.num_dropped == 0
    return decisions


def ask(log: DecisionLog, policy: Policy, signals: list[Signals]) -> list[Decision]:
    decisions = []
    for s in signals:
        decisions.append(policy.decide(s))
        log.record(s, decisions[-1])
    return decisions


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for every line: how fast the writer's thread gets its turn is no part of these tests."""
    monkeypatch.setattr("morphserve.control.decisions.decision_log._MAX_PENDING", 10_000)


def assert_problem(found: Replay, words: str) -> None:
    assert not found.agrees and any(words in problem for problem in found.problems), found.problems


def row(signals: Signals, seq: int = 1, new_step: bool = True) -> Row:
    return Row("decision", seq, 7.0, True, signals.kv_usage, new_step, Decision(0, "because"), signals)


def errors(path: Path) -> list[str]:
    return [str(line) for _, line in read_log(path) if isinstance(line, LogError)]
