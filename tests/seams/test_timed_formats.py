"""What a calibration times: the formats and the steps of the server that it is for."""

from __future__ import annotations

from typing import Any

import pytest

from morphserve.config import parse_config
from morphserve.default_ladder import Device, settle
from morphserve.integration.offline import timed_engine


@pytest.mark.parametrize(
    ("of_device", "ladder", "timed"),
    [
        (("fp8", "w4"), {}, ["fp8", "w4"]),
        (("w4",), {}, ["w4"]),
        ((), {}, ["w8", "w4"]),
        (("fp8", "w4"), {"steps": [{"format": "w8"}]}, ["w8"]),
    ],
    ids=["GPU that multiplies fp8", "older GPU", "CPU", "steps that are listed"],
)
def test_the_formats_that_a_server_has_are_timed(
    monkeypatch: pytest.MonkeyPatch, of_device: tuple[str, ...], ladder: dict[str, Any], timed: list[str]
) -> None:
    """Guards: a GPU's calibration of w8, which its ladder does not have, and none of fp8, which it has."""
    monkeypatch.setattr(timed_engine, "default_formats", lambda: of_device)
    formats, steps = timed_engine._one_level_each(parse_config({"ladder": ladder}))
    assert formats == timed == [step["format"] for step in steps]


def test_a_cap_on_quality_cuts_nothing_that_is_timed() -> None:
    """Guards: a calibration without w4, or of half of the layers in it, where the settings cap what levels may cost."""
    quality = {"max_kl_per_token": 0.05}
    config = parse_config({"quality": quality, "ladder": {"expected_kl": {"w4": 0.3}}})
    settings = timed_engine._settings(config, timed_engine._one_level_each(config)[1])
    settled = settle(parse_config(settings), Device(30), levels_are_known=False).config
    assert isinstance(settled.ladder.steps, list)
    assert [(step.format, step.layers) for step in settled.ladder.steps] == [("w8", "all"), ("w4", "all")]


@pytest.mark.parametrize(
    ("most", "batches"), [(1, (1,)), (2, (1, 2)), (48, (1, 2, 4, 8, 16, 32, 48)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_steps_are_timed_up_to_the_largest(most: int, batches: tuple[int, ...]) -> None:
    """Guards: figures that end at 64 sequences for a server of 256, or go beyond what it admits."""
    assert timed_engine._batches(most) == batches
