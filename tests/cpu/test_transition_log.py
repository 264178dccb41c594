"""The one line that each transition leaves in the log, which programs read."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from morphserve.control.transition import logfmt
from policies import PolicySetup, StaticConfig, StaticPolicy
from tests.fakes import BASE_BLOCKS, Rig

pytestmark = pytest.mark.cpu

DOCS = Path(__file__).parents[2] / "docs" / "watching.md"
_PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"=]+)(?: |$)')


def read(message: str) -> dict[str, str]:
    """What a program makes of a line: everything behind the first colon must be pairs."""
    pairs = message.partition(": ")[2]
    found = _PAIR.findall(pairs)
    assert "".join(f"{key}={value} " for key, value in found).strip() == pairs, message
    assert len(found) == len(dict(found)), "a key twice"
    return {key: json.loads(value) if value.startswith('"') else value for key, value in found}


def ends(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, str]]]:
    """The ends of transitions in the log, each with the level of its line."""
    records = [record for record in caplog.records if "outcome=" in record.getMessage()]
    return [(record.levelname, read(record.getMessage())) for record in records]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_a_transition_is_one_line_that_says_all(logged: pytest.LogCaptureFixture) -> None:
    """Guards: words that every program has to guess at; a figure of another transition, or none."""
    rig = Rig()
    rig.go_to(3)
    blocks = rig.pool.num_kv_blocks
    rig.go_to(0)
    (_, degrade), (level, restore) = ends(logged)
    assert level == "INFO"
    row = rig.controller.status()["recent_transitions"][1]
    told = {"direction": "degrade", "outcome": "committed", "from_level": "0", "to_level": "3", "order": "none"}
    assert degrade.items() >= {**told, "policy": "slo", "reason": "script wants 3", "error": ""}.items()
    assert (degrade["kv_blocks_before"], degrade["kv_blocks_after"]) == (str(BASE_BLOCKS), str(blocks))
    assert (restore["kv_blocks_before"], restore["kv_blocks_after"]) == (str(blocks), str(BASE_BLOCKS))
    assert int(degrade["num_layers"]) == row["num_layers"] > 0 and degrade["format"] == "w8"
    assert float(degrade["seconds"]) == pytest.approx(row["seconds"], abs=6e-4) and row["seconds"] > 0
    assert restore["format"] == "base" and restore["direction"] == "restore"
    assert (restore["from_level"], restore["to_level"]) == ("3", "0")


def test_the_pause_is_the_longest_of_this_transition(logged: pytest.LogCaptureFixture) -> None:
    """Guards: a pause of the transition before, the sum of all, or none."""
    rig = Rig()  # two layers a command at most
    rig.executor.seconds_per_layer = 0.01
    rig.go_to(3)
    rig.executor.seconds_per_layer = 0.001
    rig.go_to(0)
    degrade, restore = [float(line["pause_ms"]) for _, line in ends(logged)]
    assert degrade == 20.0 and 0 < restore <= 2.0


@pytest.mark.parametrize("text", ["no memory", 'a "quoted"\nsecond=line', "\u2028 x", "", "nichts übrig"])
def test_an_abort_is_one_warning_whatever_the_error_says(text: str, logged: pytest.LogCaptureFixture) -> None:
    """Guards: an error of two lines that makes two of one, or whose words pass for keys of ours."""
    rig = Rig()
    rig.executor.fail = lambda command, plan, rank: f"{text}!" if command == "prepare" else ""
    rig.script.level = 1
    rig.step(10)
    ((level, line),) = ends(logged)
    assert level == "WARNING" and line["outcome"] == "aborted" and f"{text}!" in line["error"]
    assert (line["from_level"], line["to_level"], line["num_layers"], line["format"]) == ("0", "0", "0", "none")
    (message,) = [record.getMessage() for record in logged.records if "outcome=" in record.getMessage()]
    assert len(message.splitlines()) == 1


def test_what_breaks_half_way_has_its_line_too(logged: pytest.LogCaptureFixture) -> None:
    """Guards: a transition that begins in the log and never ends; a second alarm for one error."""
    rig = Rig()
    rig.executor.fail = lambda command, plan, rank: "planted" if command == "commit" else ""
    rig.script.level = 1
    rig.step(10)
    assert rig.controller.failed
    ((level, line),) = ends(logged)
    assert (level, line["outcome"]) == ("INFO", "aborted") and line["error"]
    assert rig.controller.counters.transitions == {("degrade", "aborted"): 1}


def test_who_has_decided_is_named(logged: pytest.LogCaptureFixture) -> None:
    """Guards: the kind at start after a reload to another; an order that nobody can tell from the policy's wish."""
    rig = Rig()
    config = StaticConfig(kind="static", level=2)
    rig.controller.replace_policy(StaticPolicy(config, rig.ladder), "edited", PolicySetup(config))
    rig.step(40)
    revision = rig.controller.status()["orders"]["revision"]
    body = json.dumps({"revision": revision, "level": 1, "for_s": 600})
    rig.controller.order("pin", body, revision, False)
    rig.step(40)
    assert [(line["policy"], line["order"]) for _, line in ends(logged)] == [("static", "none"), ("static", "pin")]


def test_who_listens_is_told_of_each(logged: pytest.LogCaptureFixture) -> None:
    """Guards: a span for what was committed alone."""
    rig = Rig()
    told: list[dict[str, Any]] = []
    rig.controller.history.on_end = told.append
    rig.go_to(2)
    rig.executor.fail = lambda command, plan, rank: "no" if command == "prepare" else ""
    rig.script.level = 0
    rig.step(10)
    assert [row["outcome"] for row in told] == ["committed", "aborted"] and told[0]["revision"] == 1


def test_the_keys_are_documented(logged: pytest.LogCaptureFixture) -> None:
    """Guards: a key that is renamed, or that nobody can look up."""
    Rig().go_to(1)
    ((_, line),) = ends(logged)
    section = DOCS.read_text(encoding="utf-8").partition("## A line for each transition\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    assert [key for row in rows for key in re.findall(r"`(\w+)`", row)] == list(line)
    example = next(row for row in section.splitlines() if row.startswith("(EngineCore"))
    assert list(read(example[example.index("morph r") :])) == list(line)


def test_logfmt_quotes_what_a_parser_would_stumble_over() -> None:
    """Guards: a value that ends at its first space, or swallows the next key."""
    assert logfmt({"a": None, "b": 1.23456, "c": "two words", "d": "", "e": "x=y", "f": True, "g": "w8/base"}) == (
        'a=none b=1.235 c="two words" d="" e="x=y" f=True g=w8/base'
    )
