"""A status in words: every figure that is there, none that is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from cpu.watched import recorded, replicas

from morphserve.status_view import UNTOLD, Line, Panel, panels

pytestmark = pytest.mark.cpu


def panel(**changed: Any) -> Panel:
    """The burst's panel, with other values in the status."""
    (made,) = panels({**recorded("burst"), **changed})
    return made


def line(label: str, **changed: Any) -> Line:
    (found,) = (line for line in panel(**changed).lines if line.label == label)
    return found


@pytest.mark.parametrize("name", ["calm", "moving", "burst", "restored"])
def test_a_recorded_status_is_told_whole(name: str) -> None:
    """Guards: a field that the engine calls otherwise than who shows it, and nobody notices."""
    (shown,) = panels(recorded(name))
    assert UNTOLD not in {shown.summary, *(line.text for line in shown.lines), *(bar.text for bar in shown.bars)}
    assert len(shown.levels) == recorded(name)["deepest_level"] + 1


def test_a_missing_field_costs_its_own_line() -> None:
    """Guards: a server of another version ends the view in a traceback, or shows nothing at all."""
    for name in recorded("burst"):
        status = recorded("burst")
        del status[name]
        (shown,) = panels(status)
        untold = [line.label for line in shown.lines if line.text == UNTOLD]
        assert len(untold) <= 3 and len(shown.lines) >= 10, name


def test_a_level_on_its_way_says_where_to() -> None:
    """Guards: a transition that is stuck looks like a level at rest."""
    (shown,) = panels(recorded("moving"))
    (at_rest,) = panels(recorded("calm"))
    assert shown.lines[0].text == "1 of 5, on the way there (committing)" and "level 1 -> there of 5" in shown.summary
    assert at_rest.lines[0].text == "0 of 5" and "level 0 of 5" in at_rest.summary
    deeper = {**recorded("moving"), "target_level": 3}
    assert panels(deeper)[0].lines[0].text == "1 of 5, on the way to 3 (committing)"
    assert [row.mark for row in panels(deeper)[0].levels] == ["", "here", "", "target", "", ""]


def test_figures_of_an_engine_that_hangs_are_no_news() -> None:
    """Guards: a hung engine's last figures shown as if they were of now."""
    assert not [line for line in panel(age_s=0.6).lines if line.label == "Engine"]
    old = line("Engine", age_s=75.0)
    assert old.text == "no answer; the figures are 1 min old" and panel(age_s=75.0).tone == old.tone == "bad"
    assert panel(age_s=75.0).summary == f"{panel(age_s=0.6).summary}  no answer for 1 min"


def test_the_age_of_a_document_is_that_of_its_engines() -> None:
    """Guards: an age that is told once for all replicas, and shown of none."""
    assert [shown.tone for shown in panels({**replicas(), "age_s": 75.0})] == ["bad", "bad"]


def test_engines_have_a_panel_each() -> None:
    """Guards: of several replicas one is shown, or the figures of one under the name of another."""
    idle, busy = panels(replicas())
    assert (idle.title, busy.title) == ("engine 0", "engine 1")
    assert idle.lines == panels(recorded("calm"))[0].lines and busy.lines == panels(recorded("burst"))[0].lines


def test_late_says_of_what() -> None:
    """Guards: a share of late requests that does not say which limits, or one where nothing was promised."""
    late = copy.deepcopy(recorded("burst")["late"])
    late |= {"ttft_s": 2.0, "tpot_s": 0.15, "num_judged": 400, "num_late": 10}
    late["recent"] = {"num_judged": 100, "num_late": 0}
    shown = line("Late", late=late)
    assert shown.text == "10 of 400 (2.5 %); lately 0 of 100" and shown.tone == ""
    assert "first token after 2 s or over 150 ms per token" in shown.note
    assert line("Late", late={**late, "recent": {"num_judged": 100, "num_late": 1}}).tone == "warn"
    assert line("Late", late={**late, "recent": {"num_judged": 100, "num_late": 2}}).tone == "bad"
    none = {**late, "ttft_s": None, "tpot_s": None, "num_judged": 0, "num_late": 0}
    policy = {**recorded("burst")["policy"], "kind": "threshold"}
    assert line("Late", late=none, policy=policy).text == "nothing is promised by policy threshold"


def test_quality_that_nobody_measured_is_not_0() -> None:
    """Guards: tokens of a level without a KL are shown as if they had cost nothing."""
    quality = {"tokens": 100, "degraded_tokens": 40, "unpriced_tokens": 40, "expected_nats": 0.0}
    shown = line("Quality", quality={**quality, "expected_kl_per_token": 0.0})
    assert "40 tokens come from levels whose cost nobody has measured" in shown.note and shown.tone == "warn"
    (calm,) = panels(recorded("calm"))
    assert {row.kl for row in calm.levels[1:]} - {"0"} and calm.levels[0].kl == "0"


def test_what_a_server_does_with_spare_time_is_told() -> None:
    """Guards: a child that an operator finds in `ps` alone; a line for servers that were not asked to prepare."""
    idle = {"state": "idle", "part": "", "note": "", "begins_in_s": 120.0}
    assert line("Prepare", prepare=idle) == Line("Prepare", "idle, in 2 min without a request")
    running = {**idle, "state": "running", "part": "input scales: 3 of 30", "begins_in_s": None}
    assert line("Prepare", prepare=running) == Line("Prepare", "running, input scales: 3 of 30")
    failed = line("Prepare", prepare={**idle, "state": "failed", "note": "no room."})
    assert failed.note == "no room." and failed.tone == "warn"
    assert line("Prepare", prepare={**running, "state": "done", "part": ""}).text == "done"
    for other in ({}, {"prepare": None}):
        assert "Prepare" not in [each.label for each in panel(**other).lines]


def test_time_that_requests_hold_others_is_told() -> None:
    """Guards: an operator who cannot see why strict limits have stopped to count, or a line where nothing was spent."""
    full, part = ({"per_hour_s": 60.0, "left_s": left_s, "is_spent": False} for left_s in (60.0, 41.6))
    assert "Holds" not in [each.label for each in panel(holds={"limits": full}).lines]
    assert line("Holds", holds={"floors": full, "limits": part}).text == "limits 42 s of 60 an hour"
    spent = line("Holds", holds={"limits": {**part, "left_s": 2.0, "is_spent": True}})
    assert spent.tone == "warn" and "spent: limits" in spent.note


def test_trouble_is_told_in_its_tone() -> None:
    """Guards: a server that gave up, refuses requests or has refused an edited file looks like any other."""
    assert line("Errors", failed=True, errors={"policy": 1}).tone == "bad"
    assert line("Errors", errors={"prepare": 2}) == Line("Errors", "2 prepare", tone="warn")
    assert line("Door", max_queued_tokens=4096).text == "refuses requests beyond 4,096 queued tokens"
    assert line("Door", min_floor=3).text == "refuses requests that may not be served at level 3"
    assert "and requests that" in line("Door", max_queued_tokens=4096, min_floor=3).text
    policy = {**recorded("burst")["policy"], "last_error": "morph.yaml: not valid YAML"}
    assert line("Policy", policy=policy).tone == "bad" and panel(policy=policy).tone == "bad"
    assert line("Policy", predictions="learning").text == "slo, predictions learning"
    assert panel(used_kv_blocks=recorded("burst")["num_kv_blocks"] - 1).bars[0].share == 1.0
    assert panel(failed=True).summary.endswith("gave up")
