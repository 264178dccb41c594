"""The status that an engine gives: all that is shown of it, under the names that it is looked for."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from morphserve.control import EngineView, Health
from morphserve.control.reload import Reloads
from morphserve.integration.engine.histogram import TimeHistogram
from morphserve.integration.engine.hooks import Morph
from morphserve.integration.engine.requests.request_limits import LateCount
from morphserve.integration.engine.status import StatusPage
from morphserve.status_view import UNTOLD, panels
from policies import Promise
from tests.fakes import Rig


def status(rig: Rig, tokens: list[int], costs: list[float | None], **parts: Any) -> dict[str, Any]:
    """What an engine around this controller says, with such tokens and costs by level."""
    padding: list[float | None] = [None] * (len(rig.ladder) - len(costs))
    ladder = tuple(replace(level, expected_kl=cost) for level, cost in zip(rig.ladder, [*costs, *padding], strict=True))
    runtime = SimpleNamespace(ladder=ladder, index=0, ranks=[SimpleNamespace(kernels={})], kv_block_bytes=130)
    morph: Any = object.__new__(Morph)
    morph.__dict__ |= {
        "health": Health.RUNNING,
        "controller": rig.controller,
        "tick_times": TimeHistogram(),
        "tokens_by_level": tokens + [0] * (len(ladder) - len(tokens)),
        "traffic": SimpleNamespace(view=lambda: EngineView(3, 5, 0.7), late=LateCount(Promise(2.0, 0.15))),
        "_page": StatusPage(runtime, SimpleNamespace(pauses=[0.02]), 0),
        "gate": SimpleNamespace(num_held=0, num_held_total=0, for_door=lambda min_floor: {"min_floor": min_floor}),
        "_watch": SimpleNamespace(reloads=Reloads("slo", "morph.yaml", "0badcafe")),
        **parts,
    }
    return dict(json.loads(json.dumps(morph.status())))


def test_all_that_is_shown_is_told() -> None:
    """Guards: a field that the engine has renamed, and terminal and page say they were not told it."""
    rig = Rig()
    rig.go_to(2)
    (shown,) = panels(status(rig, [10], [None, 0.01]))
    told = {line.label: line.text for line in shown.lines} | {bar.label: bar.text for bar in shown.bars}
    assert UNTOLD not in told.values() and shown.summary != UNTOLD
    assert told["Requests"] == "5 running, 3 waiting, the oldest for 0.7 s" and told["Level"] == "2 of 6"
    assert [change.move for change in shown.changes] == ["0 -> 2"] and len(shown.levels) == 7


def test_a_status_after_the_hooks_have_failed() -> None:
    """Guards: reading queues that can be read no more takes the whole status with it."""

    def broken() -> EngineView:
        raise OSError("planted")

    told = status(
        Rig(), [0], [], health=Health.RESTING, traffic=SimpleNamespace(view=broken, late=LateCount(Promise()))
    )
    assert told["num_running"] == 0 and told["late"]["ttft_s"] is None


@pytest.mark.parametrize(
    ("tokens", "costs", "expected"),
    [
        ([], [None, 0.01], (0, 0, 0, None)),
        ([90, 10], [None, 0.01], (100, 10, 0, 0.001)),
        ([50, 10, 40], [None, 0.01], (100, 50, 40, pytest.approx(0.1 / 60))),
        ([0, 10], [None, None], (10, 10, 10, None)),
    ],
)
def test_quality_is_priced_where_somebody_measured(
    tokens: list[int], costs: list[float | None], expected: tuple[Any, ...]
) -> None:
    """Guards: tokens of a level that nobody measured are free, or those of level 0 cost something."""
    told = status(Rig(), tokens, costs)["quality"]
    found = (told["tokens"], told["degraded_tokens"], told["unpriced_tokens"], told["expected_kl_per_token"])
    assert found == expected
