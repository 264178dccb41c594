"""Lines of a decision log: each comes back as it was, and one of another schema or with foreign fields is refused."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from cpu.log_world import LADDER, SETUPS, SLO, THRESHOLD, load, patient, row, write
from hypothesis import given
from hypothesis import strategies as st

from morphserve.__main__ import main
from morphserve.control import DecisionLog, make_header
from morphserve.control.decisions.decision_log import SCHEMA, Row, to_text
from morphserve.control.decisions.replay_log import LINE, read_log, replay
from policies import (
    Cohort,
    Decision,
    Order,
    OrderKind,
    OwnLimit,
    PolicySetup,
    Signals,
    StepLoad,
)

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("patient")]

__all__ = ["patient"]  # the fixture

cohorts = st.builds(
    Cohort, st.integers(1, 9), st.integers(1, 999), st.floats(), st.floats(), st.none() | st.floats(), st.none(),
    st.booleans(),
)  # fmt: skip
steps = st.builds(StepLoad, st.floats(), st.just(1), st.just(0), st.just(9), st.just(0))
VALUES: dict[object, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: st.floats() | st.sampled_from([0.0, -0.0, 5e-324, 0.1 + 0.2]),
    bool: st.booleans(),
    int | None: st.none() | st.integers(),
    tuple[Cohort, ...]: st.lists(cohorts, max_size=3).map(tuple),
    tuple[OwnLimit, ...]: st.lists(st.builds(OwnLimit, st.floats(), st.integers()), max_size=3).map(tuple),
    StepLoad | None: st.none() | steps,
    Order | None: st.none() | st.builds(Order, st.sampled_from(get_args(OrderKind)), st.integers(), st.text()),
}
any_signals = st.builds(Signals, **{name: VALUES[hint] for name, hint in get_type_hints(Signals).items()})
decisions = st.builds(
    Decision, st.integers(), st.text(), st.none() | st.integers(), min_floor=st.integers(), is_final=st.booleans()
)


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
        max_level = 0

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
    seen = (Signals, Cohort, OwnLimit, StepLoad, Order)
    names = {cls.__name__: " ".join(field.name for field in fields(cls)) for cls in seen}
    assert SCHEMA == 3 and names == {
        "Signals": "now_s level target_level num_kv_blocks used_kv_blocks num_waiting num_running oldest_wait_s "
        "preemptions preemption_rate arrival_rate queue_delay_s ttft_s tpot_s step_s blocks_per_request waiting "
        "last_step prompt_tokens output_tokens num_arrivals running_limits order max_level max_level_alone",
        "Cohort": "num_requests num_tokens first_arrival_s last_arrival_s ttft_s tpot_s has_token",
        "OwnLimit": "limit_s num_requests",
        "StepLoad": "seconds num_seqs prefill_tokens context_tokens level",
        "Order": "kind level reason",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 9}, "schema 9, written by morphserve .*; this version reads schema 3. Replay it with the version"),
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
        f"line 1: schema 1, written by morphserve {version}; this version reads schema 3. Replay it with the version "
        "that wrote it."
    ]
    write(path, THRESHOLD, load(1, 20))
    found = replay(path)
    assert found.problems == problem and found.compared == 20 and not found.notes
