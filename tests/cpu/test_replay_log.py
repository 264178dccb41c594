"""A decision log of every pair: it comes back as it was, it replays, and it says so when it cannot."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.__main__ import main
from morphserve.config import LadderConfig, parse_config
from morphserve.control import DecisionLog, make_header
from morphserve.control.budget import RankBytes
from morphserve.control.decision_log import LogError, PairReader, PairWriter, read_header
from morphserve.control.ladder import build_ladder
from morphserve.control.replay_log import Replay, replay
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
from tests.fakes import Rig

pytestmark = pytest.mark.cpu

LADDER = build_ladder(
    6, [RankBytes({"base": [1000] * 6, "w8": [500] * 6, "w4": [300] * 6}, 100)], LadderConfig(), 20
)
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
SETUPS = {"threshold": THRESHOLD, "slo": SLO, "static": PolicySetup(StaticConfig(kind="static", level="w8"))}


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
    log = DecisionLog(path, header=make_header(setup, LADDER))
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


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for every line: how fast the writer's thread gets its turn is no part of these tests."""
    monkeypatch.setattr("morphserve.control.decision_log._MAX_PENDING", 10_000)


def assert_problem(found: Replay, words: str) -> None:
    assert not found.agrees and any(words in problem for problem in found.problems), found.problems


# ---- lines


numbers = st.one_of(st.integers(-3, 3), st.floats(), st.sampled_from([0.0, -0.0, 1, 1.0, True, False, inf]))
cohorts = st.builds(
    Cohort, st.integers(1, 9), st.integers(1, 999), st.floats(), st.floats(), st.none() | st.floats(), st.none(),
    st.booleans(),
)  # fmt: skip
steps = st.builds(StepLoad, st.sampled_from([0.1, 0.2]), st.just(1), st.just(0), st.just(9), st.just(0))


@st.composite
def any_signals(draw: st.DrawFn) -> Signals:
    values = {field.name: draw(numbers) for field in fields(Signals)}
    values["tightest_tpot_s"] = draw(st.none() | numbers)
    values["waiting"] = tuple(draw(st.lists(cohorts, max_size=3)))
    return Signals(**{**values, "last_step": draw(st.none() | steps)})


@given(st.lists(st.tuples(any_signals(), st.sampled_from([Decision(0, "a"), Decision(2, "b", 7), Decision(2, "b")]))))
def test_pairs_come_back_bit_by_bit(pairs: list[tuple[Signals, Decision]]) -> None:
    """Guards: a float that is rounded, 0.0 for -0.0, 1 for 1.0, cohorts as lists, a change that is not written."""
    writer, reader = PairWriter(), PairReader()
    for number, (signals, decision) in enumerate(pairs):
        back = reader.pair(json.loads(writer.line(number, signals, decision)))
        assert repr(back) == repr((number, signals, decision))  # repr: NaN is not equal to itself
        assert type(back[1].waiting) is tuple


def test_equal_steps_stay_two_and_one_stays_one() -> None:
    """Guards: a policy that counts each step once counts another number of them in the replay."""
    first, second = StepLoad(0.1, 1, 0, 9, 0), StepLoad(0.1, 1, 0, 9, 0)
    writer, reader = PairWriter(), PairReader()
    base = load(0, 1)[0]
    back = [
        reader.pair(json.loads(writer.line(i, replace(base, last_step=step), Decision(0, ""))))[1].last_step
        for i, step in enumerate([first, first, second, None, second])
    ]
    assert back[0] is back[1] and back[1] == back[2] and back[1] is not back[2]
    assert back[3] is None and back[4] == second


@pytest.mark.parametrize("missing", ["signal", "decision"])
def test_pair_that_builds_on_nothing(missing: str) -> None:
    """Guards: a placeholder handed to a policy as a signal."""
    line = json.loads(PairWriter().line(1, load(0, 1)[0], Decision(0, "")))
    with pytest.raises(LogError, match="builds on lines which are not there"):
        PairReader().pair([line[0], line[1][2:], line[2]] if missing == "signal" else line[:2])


def test_lines_are_small() -> None:
    """Guards: every pair written out in full fills a disk."""
    writer, base = PairWriter(), load(0, 1)[0]
    sizes = [len(writer.line(i, replace(base, now_s=base.now_s + i / 10), Decision(0, "hold"))) for i in range(5)]
    assert sizes[0] > 200 and max(sizes[1:]) < 40


@pytest.mark.parametrize("kind", SETUPS)
def test_header_comes_back(kind: str) -> None:
    """Guards: the policy is rebuilt on another ladder, other step times or other limits."""
    for ladder in (LADDER, tuple(replace(level, time_factors=((1, 1.0), (8, 0.333))) for level in LADDER)):
        header = make_header(SETUPS[kind], ladder, 3)
        assert read_header(json.loads(json.dumps(header.document()))) == header


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2, this version replays 1"),
        ({"fields": ["now_s"]}, "its Signals are not those of this version, the difference: .*arrival_rate"),
        ({"policy": {"kind": "oracle"}}, "oracle"),
        ({"ladder": [{}]}, "layer_formats"),
        ({"limits": {"blocks": 1}}, "blocks"),
    ],
)
def test_foreign_header_is_refused(change: dict[str, object], words: str) -> None:
    """Guards: signals of another version are taken for these, or a traceback instead of a reason."""
    with pytest.raises(LogError, match=words):
        read_header({**make_header(SLO, LADDER).document(), **change})


# ---- logs


@pytest.mark.parametrize("kind", SETUPS)
def test_log_replays(kind: str, tmp_path: Path) -> None:
    """Guards: a policy that is rebuilt otherwise than it was, or asked something else."""
    decisions = write(tmp_path / "log", SETUPS[kind], load(1, 900))
    assert kind == "static" or len({d.level for d in decisions}) > 1 and len({d.reason for d in decisions}) > 5
    found = replay(tmp_path / "log")
    assert found.agrees and found.compared == 900 and not found.notes and found.skipped == 0


def test_controllers_pairs_replay(tmp_path: Path) -> None:
    """Guards: a pair that the policy was asked and the log has not."""
    path = tmp_path / "log"
    rig = Rig()
    log = DecisionLog(path, header=make_header(THRESHOLD, rig.ladder))
    rig = Rig(policy=THRESHOLD.build(rig.ladder), log=log)
    rig.pool.allocate(1, 18)
    rig.step(30)
    rig.pool.finish(1)
    rig.step(40)
    assert rig.controller.counters.transitions
    log.close()
    found = replay(path)
    assert found.agrees and found.compared == 70


def test_another_answer_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: exit status 0 for a log that differs; a difference that nobody can find."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(2, 100))
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if i > 20 and line.count("[") > 3 and json.loads(line)[2:])
    line = json.loads(lines[at])
    line[2][0] += 1
    lines[at] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")
    assert main(["replay-log", str(path)]) == 1
    out = capsys.readouterr().out.splitlines()
    document = json.loads(out[-1])
    assert not document["agrees"] and document["differing"] >= 1 and not document["problems"]
    first = document["first_difference"]
    assert first["line"] == at + 1 and first["logged"]["level"] == first["replayed"]["level"] + 1
    assert any("logged   level" in text for text in out) and any("replayed level" in text for text in out)


@pytest.mark.parametrize("field", ["reason", "max_queued_tokens"])
def test_whole_decision_counts(field: str, tmp_path: Path) -> None:
    """Guards: only the level is compared."""
    signals = load(3, 1)
    log = DecisionLog(tmp_path / "log", header=make_header(THRESHOLD, LADDER))
    decision = THRESHOLD.build(LADDER).decide(signals[0])
    log.record(signals[0], replace(decision, **{field: 7 if field == "max_queued_tokens" else "because"}))
    log.close()
    assert replay(tmp_path / "log").differing == 1


def test_reload_switches_the_policy(tmp_path: Path) -> None:
    """Guards: the replay goes on with the policy that was replaced, or with one that remembers."""
    path, signals = tmp_path / "log", load(4, 600)
    log = DecisionLog(path, header=make_header(THRESHOLD, LADDER))
    ask(log, THRESHOLD.build(LADDER), signals[:200])
    log.policy_changed("edited", SLO.document())
    ask(log, SLO.build(LADDER), signals[200:400])
    log.policy_changed("edited", THRESHOLD.document())
    ask(log, THRESHOLD.build(LADDER), signals[400:])
    log.close()
    found = replay(path)
    assert found.agrees and found.policies == ["threshold default", "slo default", "threshold default"]


def test_other_policy_is_asked_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: --policy that asks the logged one, restarts at a reload, or does not say what it is worth."""
    path, other, signals = tmp_path / "log", tmp_path / "other.yaml", load(5, 400)
    log = DecisionLog(path, header=make_header(THRESHOLD, LADDER))
    decisions = ask(log, THRESHOLD.build(LADDER), signals[:200])
    log.policy_changed("edited", SLO.document())
    decisions += ask(log, SLO.build(LADDER), signals[200:])
    log.close()
    other.write_text("policy: {kind: static, level: w8}\n")
    assert main(["replay-log", str(path), "--policy", str(other)]) == 1
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document["open_loop"] and document["policies"] == ["static w8"] and "an open loop" in out
    assert document["compared"] == 400 and document["replayed_levels"] == {"2": 400}
    expected = sum(replace(d, reason="static level 2", level=2) != d for d in decisions)
    assert document["differing"] == expected


def test_slo_may_be_asked_of_a_log_that_has_no_step_times(tmp_path: Path) -> None:
    """Guards: limits that only an slo log carries; step times that are looked for in the log alone."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(6, 50))
    (tmp_path / "times.json").write_text(json.dumps(TIMES.document()))
    asked = parse_config({"policy": {"kind": "slo"}, "step_times": str(tmp_path / "times.json")})
    assert replay(path, asked).policies == ["slo default"]
    assert_problem(replay(path, parse_config({"policy": {"kind": "slo"}})), "there are none")


# ---- what cannot be claimed


def test_sample_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the usual log taken for whole."""
    log = DecisionLog(tmp_path / "log")
    for s in load(7, 100):
        log.record(s, Decision(0, ""))
    log.close()
    assert main(["replay-log", str(tmp_path / "log")]) == 1
    out = capsys.readouterr().out
    assert out.count("NOT PROVEN") == 1 and "decision_log_detail: changes" in out


class SlowDisk:
    """Room for 100 lines, and a writer that stops at its next one until `go_on`."""

    def __init__(self, path: Path, setup: PolicySetup, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("morphserve.control.decision_log._MAX_PENDING", 100)
        self.log = DecisionLog(path, header=make_header(setup, LADDER))
        self._gate, self._drained, self._to_line = threading.Event(), threading.Event(), self.log._to_line
        monkeypatch.setattr(self.log, "_to_line", self._held)

    def _held(self, entry: Any) -> str:
        self._gate.wait()
        if self.log._pending.empty():
            self._drained.set()
        return self._to_line(entry)

    def go_on(self) -> None:
        self._gate.set()
        self._drained.wait()


@pytest.mark.parametrize("lost", ["end", "middle"])
def test_dropped_pairs_are_marked(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a gap that nobody sees; a policy asked on as if it had seen what it had not; numbers that run apart."""
    path, signals = tmp_path / "log", load(8, 400)
    disk = SlowDisk(path, THRESHOLD, monkeypatch)
    policy = THRESHOLD.build(LADDER)
    ask(disk.log, policy, signals[:300])
    dropped = disk.log.num_dropped
    assert 190 < dropped < 210
    disk.go_on()
    if lost == "middle":
        ask(disk.log, policy, signals[300:340])
        disk.log.policy_changed("edited", THRESHOLD.document())
        ask(disk.log, THRESHOLD.build(LADDER), signals[340:360])
    disk.log.close()
    found = replay(path)
    assert_problem(found, f"{dropped} pairs were dropped here")
    assert found.differing == 0 and len(found.problems) == 1 and not found.notes
    assert found.skipped == (40 if lost == "middle" else 0)
    assert found.compared == 300 - dropped + (20 if lost == "middle" else 0)


def test_reload_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: pairs of the new policy compared with the old one's, because the line between them found no room."""
    path, signals = tmp_path / "log", load(9, 200)
    disk = SlowDisk(path, THRESHOLD, monkeypatch)
    ask(disk.log, THRESHOLD.build(LADDER), signals[:150])
    disk.log.policy_changed("edited", SLO.document())
    policy = SLO.build(LADDER)
    ask(disk.log, policy, signals[150:160])  # no room: dropped, behind the event
    disk.go_on()
    ask(disk.log, policy, signals[160:])
    disk.log.close()
    found = replay(path)
    assert found.policies == ["threshold default", "slo default"]
    gaps = [problem.split()[2] for problem in found.problems]
    assert gaps == [str(disk.log.num_dropped - 10), "10"]
    assert found.differing == 0 and found.skipped == 40


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: lines[:-3] + [lines[-3][:9]], "the line is cut"),
        (lambda lines: lines[:50] + lines[51:], "pair 51 stands where 50 is due"),
        (lambda lines: lines[:-2] + lines[-1:], "the log ends after pair 100, the last one here is 99"),
        (lambda lines: lines[1:], "decisions without a header"),
        (lambda lines: lines[:1], "no decision in it"),
        (lambda lines: [*lines[:20], '{"event":"tea"}\n', *lines[20:]], "no line that this version writes"),
        (lambda lines: [lines[0].replace('"schema":1', '"schema":9', 1), *lines[1:]], "schema 9"),
        (lambda lines: [*lines[:20], "[20,[99,1]]\n"], "no pair of signals"),
        (lambda lines: [], "no decision in it"),
    ],
)  # fmt: skip
def test_damage_is_named(damage: object, words: str, tmp_path: Path) -> None:
    """Guards: "all agree" of a log of which a part is missing; one damaged line reported a thousand times."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(10, 100))
    path.write_text("".join(damage(path.read_text().splitlines(keepends=True))))  # type: ignore[operator]
    found = replay(path)
    assert_problem(found, words)
    assert len(found.problems) == 1 and found.differing == 0


def test_restart_appends(tmp_path: Path) -> None:
    """Guards: a killed server's half line spoils the log of the next one; its policy is carried over."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(11, 80))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-10]) + "[70,[0,")
    write(path, SETUPS["static"], load(12, 30))
    found = replay(path)
    assert_problem(found, "the line is cut")
    assert found.compared == 71 + 30 and found.differing == 0 and len(found.problems) == 1


def test_killed_server_is_a_note(tmp_path: Path) -> None:
    """Guards: whole lines that cannot be used because the server did not end in order; silence about it."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(13, 20))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found = replay(path)
    assert found.agrees and "not closed" in found.notes[0]


def test_other_version_is_a_note(tmp_path: Path) -> None:
    """Guards: a log that cannot be replayed after every release, or one that hides where it is from."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(14, 20))
    path.write_text(path.read_text().replace('"morphserve":"', '"morphserve":"9.', 1))
    found = replay(path)
    assert found.agrees and "written by morphserve 9." in found.notes[0]


def test_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a traceback."""
    assert main(["replay-log", str(tmp_path / "none")]) == 1
    assert "none: No such file or directory. Give a readable file." in capsys.readouterr().err
