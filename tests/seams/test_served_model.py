"""Levels measured offline: how long files are waited for, and what is read for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from morphserve.config import MorphServeConfig
from morphserve.integration.offline import served_model
from morphserve.integration.offline.level_engine import LevelEngine

pytestmark = pytest.mark.seams


class Started(Exception):
    """An engine would start now."""


@pytest.mark.parametrize(("own", "expected"), [({}, 600.0), ({"transition": {"rank_timeout_s": 5.0}}, 5.0)])
def test_measuring_waits_longer_than_a_server_may(
    own: dict[str, Any], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: twenty minutes of measuring thrown away because 0.9 GB of files took a busy machine 16 seconds."""
    given: list[Any] = []

    def start(self: LevelEngine, model: str, settings: Any, **arguments: Any) -> None:
        given.append(settings)
        raise Started

    monkeypatch.setattr(LevelEngine, "__init__", start)
    with pytest.raises(Started):
        served_model.ServedModel("model", 64, {"ladder": {"steps": [{"format": "w8"}]}} | own)
    timeout_s = MorphServeConfig.model_validate(given[0]).transition.rank_timeout_s
    assert timeout_s == expected if own else timeout_s >= expected


class Recorded:
    """A model that notes what it is put into."""

    def __init__(self) -> None:
        self.puts: list[Mapping[int, str]] = []

    def put(self, layers: Mapping[int, str]) -> None:
        """Note the formats."""
        self.puts.append(layers)

    def compare(self, ids: list[int], is_base: bool) -> dict[str, float]:
        """Say that nothing was lost."""
        return {"nll": 1.0} if is_base else {"nll": 1.0, "kl": 0.0, "top1": float(len(ids) - 1)}

    def step_time_factor(self, layers: Mapping[int, str]) -> float:
        """Say that nothing was gained."""
        return 1.0


def test_what_is_measured_depends_on_no_way_back() -> None:
    """Guards: all layers read once more behind the last figure, and every figure lost if that fails."""
    model: Any = Recorded()
    w8, w4 = {0: "w8"}, {0: "w4"}
    rows = served_model.measure_levels(model, [w8, w4], [[1, 2, 3], [4, 5, 6]])
    assert model.puts == [{}, w8, w4, {}, w8, w4]
    assert [row["top1"] for row in rows] == [1.0, 1.0]


@pytest.mark.parametrize("is_timed", [False, True])
def test_each_level_that_is_timed_counts_too(is_timed: bool) -> None:
    """Guards: a quarter of an hour of timing in which `67 of 216` stands still."""
    done: list[None] = []
    model: Any = Recorded()
    served_model.measure_levels(model, [{0: "w8"}, {0: "w4"}], [[1, 2, 3]], is_timed, lambda: done.append(None))
    assert len(done) == 2 * (1 + is_timed)
