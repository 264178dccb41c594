"""A decision log of every row replays: its policy, asked again, gives the same answers, and another one is compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cpu.log_world import LADDER, SETUPS, SLO, THRESHOLD, TIMES, ask, load, patient, write

from morphserve.__main__ import main
from morphserve.config import parse_config
from morphserve.control import DecisionLog, make_header
from morphserve.control.decisions.replay_log import replay
from tests.fakes import Rig

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("patient")]

__all__ = ["patient"]  # the fixture


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
    assert replay(path, parse_config({"policy": {"kind": "slo"}})).compared == 50, "it learns them from the log"
