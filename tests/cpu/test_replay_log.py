"""A decision log of every row: it comes back as it was, it replays, and it says so when it cannot."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.__main__ import main
from morphserve.config import LadderConfig, parse_config
from morphserve.control import DecisionLog, make_header
from morphserve.control.budget import RankBytes
from morphserve.control.decision_log import SCHEMA, Header, Mark, Row, to_text
from morphserve.control.ladder import build_ladder
from morphserve.control.replay_log import LINE, LogError, Replay, read_log, replay
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


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for every line: how fast the writer's thread gets its turn is no part of these tests."""
    monkeypatch.setattr("morphserve.control.decision_log._MAX_PENDING", 10_000)


def assert_problem(found: Replay, words: str) -> None:
    assert not found.agrees and any(words in problem for problem in found.problems), found.problems


def row(signals: Signals, seq: int = 1, new_step: bool = True) -> Row:
    return Row("decision", seq, 7.0, True, signals.kv_usage, new_step, Decision(0, "because"), signals)


def errors(path: Path) -> list[str]:
    return [str(line) for _, line in read_log(path) if isinstance(line, LogError)]


# ---- lines


cohorts = st.builds(
    Cohort, st.integers(1, 9), st.integers(1, 999), st.floats(), st.floats(), st.none() | st.floats(), st.none(),
    st.booleans(),
)  # fmt: skip
steps = st.builds(StepLoad, st.floats(), st.just(1), st.just(0), st.just(9), st.just(0))
VALUES: dict[object, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: st.floats() | st.sampled_from([0.0, -0.0, 5e-324, 0.1 + 0.2]),
    float | None: st.none() | st.floats(),
    tuple[Cohort, ...]: st.lists(cohorts, max_size=3).map(tuple),
    StepLoad | None: st.none() | steps,
}
any_signals = st.builds(Signals, **{name: VALUES[hint] for name, hint in get_type_hints(Signals).items()})
decisions = st.builds(Decision, st.integers(), st.text(), st.none() | st.integers(), st.booleans())


@given(any_signals, decisions)
def test_rows_come_back_bit_by_bit(signals: Signals, decision: Decision) -> None:
    """Guards: a float that is rounded, 0.0 for -0.0, cohorts as lists or dicts, a flag or a reason that changes."""
    written = replace(row(signals), decision=decision)
    back = LINE.validate_json(to_text(written))
    assert repr(back) == repr(written)  # repr: NaN is not equal to itself
    assert to_text(written).count(b"\n") == 1


def test_numbers_take_the_type_of_their_field() -> None:
    """Guards: a whole number where a float may stand, which is no damage."""
    signals = replace(load(0, 1)[0], oldest_wait_s=0, tpot_s=3)
    back = LINE.validate_json(to_text(row(signals)))
    assert isinstance(back, Row) and back.signals == signals and isinstance(back.signals.tpot_s, float)


def test_equal_steps_stay_two_and_one_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a policy that counts each step once counts another number of them in the replay."""
    first, second = StepLoad(0.1, 1, 0, 9, 0), StepLoad(0.1, 1, 0, 9, 0)
    base, seen = load(0, 1)[0], []

    class Listener:
        def decide(self, signals: Signals) -> Decision:
            seen.append(signals.last_step)
            return Decision(0, "")

    log = DecisionLog(tmp_path / "log", make_header(THRESHOLD, LADDER))
    for step in (first, first, second, None, second):
        log.record(replace(base, last_step=step), Decision(0, ""))
    log.close()
    monkeypatch.setattr(PolicySetup, "build", lambda self, ladder: Listener())
    assert replay(tmp_path / "log").agrees
    assert seen[0] is seen[1] and seen[1] == seen[2] and seen[1] is not seen[2]
    assert seen[3] is None and seen[4] is seen[2]


@pytest.mark.parametrize("detail", ["changes", "all"])
@pytest.mark.parametrize("name", ["log", "log.gz"])
def test_compressed_rows_are_small(detail: Any, name: str, tmp_path: Path) -> None:
    """Guards: a name that promises gzip and does not have it, or a plain one that has."""
    log, base = DecisionLog(tmp_path / name, make_header(THRESHOLD, LADDER, detail=detail)), load(0, 1)[0]
    for i in range(1000):
        log.record(replace(base, now_s=base.now_s + i * 1.1), Decision(0, "hold"))
    log.close()
    assert sum(isinstance(line, Row) for _, line in read_log(tmp_path / name)) == 1000
    size = (tmp_path / name).stat().st_size / 1000
    assert size < 100 if name == "log.gz" else size > 600


@pytest.mark.parametrize("kind", SETUPS)
def test_header_comes_back(kind: str) -> None:
    """Guards: the policy is rebuilt on another ladder, other step times or other limits."""
    for ladder in (LADDER, tuple(replace(level, time_factors=((1, 1.0), (8, 0.333))) for level in LADDER)):
        header = make_header(SETUPS[kind], ladder, 3)
        assert LINE.validate_json(to_text(header)) == header


def test_other_fields_are_another_schema() -> None:
    """Guards: signals of another version are taken for these, their new fields filled with defaults.

    When this fails: raise `SCHEMA`, and write the new fields here.
    """
    names = {cls.__name__: " ".join(field.name for field in fields(cls)) for cls in (Signals, Cohort, StepLoad)}
    assert SCHEMA == 2 and names == {
        "Signals": "now_s level target_level num_kv_blocks used_kv_blocks num_waiting num_running oldest_wait_s "
        "preemptions preemption_rate arrival_rate queue_delay_s ttft_s tpot_s step_s blocks_per_request waiting "
        "last_step prompt_tokens output_tokens num_arrivals tightest_tpot_s",
        "Cohort": "num_requests num_tokens first_arrival_s last_arrival_s ttft_s tpot_s has_token",
        "StepLoad": "seconds num_seqs prefill_tokens context_tokens level",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 9}, "schema 9, written by morphserve .*; this version reads schema 2. Replay it with the version"),
        ({"setup": {"section": {"kind": "oracle"}}}, "oracle"),
        ({"ladder": [{}]}, "ladder.0.layer_formats: Field required"),
        ({"setup": {"section": {"kind": "static"}, "limits": {"blocks": 1}}}, "limits.block_size: Field required"),
        ({"engine": "0"}, "start.engine: Input should be a valid integer"),
    ],
)
def test_foreign_header_is_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    """Guards: a policy of another version is taken for this one's, or a traceback instead of a reason."""
    (tmp_path / "log").write_text(json.dumps({**json.loads(to_text(make_header(SLO, LADDER))), **change}))
    (problem,) = replay(tmp_path / "log").problems
    assert re.match(f"line 1: .*{words}", problem), problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"level": 1.5}, "signals.level: Input should be a valid integer"),
        ({"tea": 1}, "signals.tea: Unexpected keyword argument"),
        ({"now_s": None}, "signals.now_s: Input should be a valid number"),
        ({"waiting": [{}]}, "signals.waiting.0.num_requests: Field required"),
        (None, "signals: "),
    ],
)
def test_foreign_signals_are_refused(change: dict[str, object] | None, words: str, tmp_path: Path) -> None:
    """Guards: a placeholder handed to a policy as a signal; a reason that does not say which."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(0, 3))
    lines = path.read_text().splitlines()
    raw = json.loads(lines[2])
    raw["signals"] = change and raw["signals"] | change
    path.write_text("\n".join([*lines[:2], json.dumps(raw), *lines[3:]]))
    (problem,) = replay(path).problems
    assert problem.startswith("line 3: no line that this version writes (") and words in problem


SCHEMA_1 = {
    "all": [
        '{"log":"morphserve decisions","schema":1,"morphserve":"0.0.9","engine":0,"fields":["now_s"],"wall_s":1.5}',
        '[1,[0,12.5],[0,"hold",null]]',
        '{"event":"policy","wall_s":2.5,"note":"edited"}',
        "[2,[0,12.54]]",
        '{"event":"end","pairs":2}',
    ],
    "changes": [
        '{"wall_s":1.5,"changed":true,"level":0,"reason":"hold","kv_usage":0.5,"signals":{"now_s":12.5}}',
        '{"wall_s":2.5,"changed":false,"level":0,"reason":"hold","kv_usage":0.5,"signals":{"now_s":13.5}}',
    ],
}


@pytest.mark.parametrize("detail", SCHEMA_1)
def test_log_of_schema_1_is_refused(detail: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a line of the reason for each line of the log; what a newer version appends is lost with it."""
    path = tmp_path / "log"
    path.write_text("\n".join(SCHEMA_1[detail]) + "\n")
    assert main(["replay-log", str(path)]) == 1
    problem = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    version = "0.0.9" if detail == "all" else "0.1.0 or earlier"
    assert problem == [
        f"line 1: schema 1, written by morphserve {version}; this version reads schema 2. Replay it with the version "
        "that wrote it."
    ]
    write(path, THRESHOLD, load(1, 20))
    found = replay(path)
    assert found.problems == problem and found.compared == 20 and not found.notes


# ---- logs


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
@pytest.mark.parametrize("kind", SETUPS)
def test_log_replays(kind: str, name: str, tmp_path: Path) -> None:
    """Guards: a policy that is rebuilt otherwise than it was, or asked something else."""
    decisions = write(tmp_path / name, SETUPS[kind], load(1, 900))
    assert kind == "static" or len({d.level for d in decisions}) > 1 and len({d.reason for d in decisions}) > 5
    found = replay(tmp_path / name)
    assert found.agrees and found.compared == 900 and not found.notes and found.skipped == 0


def test_controllers_pairs_replay(tmp_path: Path) -> None:
    """Guards: a pair that the policy was asked and the log has not."""
    path = tmp_path / "log"
    rig = Rig()
    log = DecisionLog(path, make_header(THRESHOLD, rig.ladder))
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
    at = 25
    line = json.loads(lines[at])
    line["decision"]["level"] += 1
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
    log = DecisionLog(tmp_path / "log", make_header(THRESHOLD, LADDER))
    decision = THRESHOLD.build(LADDER).decide(signals[0])
    log.record(signals[0], replace(decision, **{field: 7 if field == "max_queued_tokens" else "because"}))
    log.close()
    assert replay(tmp_path / "log").differing == 1


def test_reload_switches_the_policy(tmp_path: Path) -> None:
    """Guards: the replay goes on with the policy that was replaced, or with one that remembers."""
    path, signals = tmp_path / "log", load(4, 600)
    log = DecisionLog(path, make_header(THRESHOLD, LADDER))
    ask(log, THRESHOLD.build(LADDER), signals[:200])
    log.policy_changed("edited", SLO)
    ask(log, SLO.build(LADDER), signals[200:400])
    log.policy_changed("edited", THRESHOLD)
    ask(log, THRESHOLD.build(LADDER), signals[400:])
    log.close()
    found = replay(path)
    assert found.agrees and found.policies == ["threshold default", "slo default", "threshold default"]


def test_other_policy_is_asked_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: --policy that asks the logged one, restarts at a reload, or does not say what it is worth."""
    path, other, signals = tmp_path / "log", tmp_path / "other.yaml", load(5, 400)
    log = DecisionLog(path, make_header(THRESHOLD, LADDER))
    decisions = ask(log, THRESHOLD.build(LADDER), signals[:200])
    log.policy_changed("edited", SLO)
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
    """Guards: the usual log taken for whole, with few decisions or with every one of them in it."""
    for seconds, detail in ((0.1, "log"), (1.0, "every")):
        log = DecisionLog(tmp_path / detail, make_header(THRESHOLD, LADDER, detail="changes"))
        for i, s in enumerate(load(7, 100)):
            log.record(replace(s, now_s=i * seconds), Decision(0, ""))
        log.close()
        assert main(["replay-log", str(tmp_path / detail)]) == 1
        out = capsys.readouterr().out
        assert out.count("NOT PROVEN") == 1 and "decision_log_detail: changes" in out


class SlowDisk:
    """Room for 100 rows, and a writer that stops at its next line until `go_on`."""

    def __init__(self, path: Path, setup: PolicySetup, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("morphserve.control.decision_log._MAX_PENDING", 100)
        monkeypatch.setattr("morphserve.control.decision_log.to_text", self._held)
        self._gate, self._drained = threading.Event(), threading.Event()
        self.log = DecisionLog(path, make_header(setup, LADDER))

    def _held(self, line: Header | Row | Mark) -> bytes:
        self._gate.wait()
        if self.log._pending.empty():
            self._drained.set()
        return to_text(line)

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
        disk.log.policy_changed("edited", THRESHOLD)
        ask(disk.log, THRESHOLD.build(LADDER), signals[340:360])
    disk.log.close()
    found = replay(path)
    assert_problem(found, f"{dropped} decisions were dropped here")
    assert found.differing == 0 and len(found.problems) == 1 and not found.notes
    assert found.skipped == (40 if lost == "middle" else 0)
    assert found.compared == 300 - dropped + (20 if lost == "middle" else 0)


def test_reload_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: answers of the new policy compared with the old one's, because the line between them found no room."""
    path, signals = tmp_path / "log", load(9, 200)
    disk = SlowDisk(path, THRESHOLD, monkeypatch)
    ask(disk.log, THRESHOLD.build(LADDER), signals[:150])
    disk.log.policy_changed("edited", SLO)
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


@pytest.mark.parametrize("name", ["log", "log.gz"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: lines[:-3] + [lines[-3][:9]], "line 100: the line is cut or damaged"),
        (lambda lines: lines[:50] + lines[51:], "line 51: decision 51 stands where 50 is due"),
        (lambda lines: lines[:-2] + lines[-1:], "the log ends after decision 100, the last one here is 99"),
        (lambda lines: lines[1:], "line 1: nothing says what policy was asked: the start is missing"),
        (lambda lines: lines[:1], "no decision in it"),
        (lambda lines: [*lines[:20], b'{"event":"tea"}\n', *lines[20:]], "line 21: no line that this version writes"),
        (lambda lines: [lines[0].replace(b'"schema":2', b'"schema":9', 1), *lines[1:]], "schema 9"),
        (lambda lines: [*lines[:20], b"[20,[99,1]]\n"], "line 21: schema 1"),
        (lambda lines: [*lines[:20], b"\xff\n", *lines[20:]], "line 21: the line is cut or damaged"),
        (lambda lines: [], "no decision in it"),
    ],
)  # fmt: skip
def test_damage_is_named(
    damage: Callable[[list[bytes]], list[bytes]], words: str, name: str, tmp_path: Path
) -> None:
    """Guards: "all agree" of a log of which a part is missing; one damaged line reported a thousand times."""
    path = tmp_path / name
    write(path, THRESHOLD, load(10, 100))
    packed = gzip.compress if name == "log.gz" else bytes
    path.write_bytes(packed(b"".join(damage(text_of(path).splitlines(keepends=True)))))
    found = replay(path)
    assert_problem(found, words)
    assert len(found.problems) == 1 and found.differing == 0


def text_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix == ".gz" else raw


def test_blank_lines_are_none(tmp_path: Path) -> None:
    """Guards: a log that an editor has touched is called damaged."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(10, 5))
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert replay(path).agrees


def test_restart_appends(tmp_path: Path) -> None:
    """Guards: a killed server's half line spoils the log of the next one; its policy is carried over."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(11, 80))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-10]) + lines[-10][:30])
    write(path, SETUPS["static"], load(12, 30))
    found = replay(path)
    assert_problem(found, "the line is cut")
    assert found.compared == 71 + 30 and found.differing == 0 and len(found.problems) == 1


def test_torn_member_ends_where_it_is_torn(tmp_path: Path) -> None:
    """Guards: what a killed server had flushed cannot be read, or what the next one appends is lost behind it."""
    path, signals = tmp_path / "log.gz", load(11, 8)
    lines_of_one = [make_header(THRESHOLD, LADDER), *(row(s, i) for i, s in enumerate(signals, start=1))]
    sizes = []
    with gzip.open(path, "wb") as member:
        for line in lines_of_one:
            member.write(to_text(line))
            member.flush()
            sizes.append(path.stat().st_size)
    torn = path.read_bytes()
    path.unlink()
    write(path, SETUPS["static"], load(12, 3))
    appended = path.read_bytes()
    after = len(text_of(path).splitlines())
    for size in range(2, len(torn)):
        path.write_bytes(torn[:size] + appended)
        lines = [line for _, line in read_log(path)]
        whole = sum(size >= flushed for flushed in sizes)
        before = lines[:-after]
        assert not any(isinstance(line, LogError) for line in [*lines[:whole], *lines[-after:]])
        assert len([line for line in before if not isinstance(line, LogError)]) >= whole
        assert sum(isinstance(line, LogError) for line in before) <= 1


def test_flipped_bits_are_damage(tmp_path: Path) -> None:
    """Guards: a traceback of zlib, or "all agree" before it; what a later server wrote lost with it."""
    path = tmp_path / "log.gz"
    write(path, THRESHOLD, load(11, 400))
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 0x55
    path.write_bytes(packed)
    write(path, THRESHOLD, load(12, 30))
    found = replay(path)
    assert_problem(found, "the line is cut or damaged")
    assert found.differing == 0 and found.compared >= 30 and len(found.problems) == 1


def test_log_that_was_compressed_later(tmp_path: Path) -> None:
    """Guards: members of gzip(1), as a rotated log has them, cannot be read."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(11, 40))
    write(path, THRESHOLD, load(12, 40))
    subprocess.run(["gzip", path], check=True)
    write(path.with_suffix(".gz"), THRESHOLD, load(13, 40))
    found = replay(path.with_suffix(".gz"))
    assert found.agrees and found.compared == 120


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
