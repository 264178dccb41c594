"""What a calibration times: the formats and the steps of the server that it is for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphserve.config import Device, parse_config, settle
from morphserve.integration.offline import timed_engine
from morphserve.integration.start import device, formats_over


@pytest.mark.parametrize(
    ("of_device", "quantization", "ladder", "timed"),
    [
        (("fp8", "w4"), None, {}, ["fp8", "w4"]),
        (("w4",), None, {}, ["w4"]),
        ((), None, {}, ["w8", "w4"]),
        ((), "compressed-tensors", {}, ["w4"]),
        (("fp8", "w4"), "compressed-tensors", {}, ["w4"]),
        (("fp8", "w4"), None, {"steps": [{"format": "w8"}]}, ["w8"]),
    ],
    ids=["GPU that multiplies fp8", "older GPU", "CPU", "8 bits already", "the same on a GPU", "steps that are listed"],
)
def test_the_formats_that_a_server_has_are_timed(
    monkeypatch: pytest.MonkeyPatch, of_device: tuple[str, ...], quantization: str | None, ladder: dict[str, Any],
    timed: list[str],
) -> None:  # fmt: skip
    """Guards: a GPU's calibration of w8, which its ladder does not have, and none of fp8, which it has; over weights of
    8 bits one of w8, which frees nothing there and is refused."""
    monkeypatch.setattr(device, "default_formats", lambda: of_device)
    model = SimpleNamespace(quantization=quantization, dtype=torch.bfloat16)
    formats, steps = timed_engine._one_level_each(parse_config({"ladder": ladder}), formats_over(model))
    assert formats == timed == [step["format"] for step in steps]


def test_a_cap_on_quality_cuts_nothing_that_is_timed() -> None:
    """Guards: a calibration without w4, or of half of the layers in it, where the settings cap what levels may cost."""
    quality = {"max_kl_per_token": 0.05}
    config = parse_config({"quality": quality, "ladder": {"expected_kl": {"w4": 0.3}}})
    settings = timed_engine._settings(config, timed_engine._one_level_each(config, ("w8", "w4"))[1])
    settled = settle(parse_config(settings), Device(30), levels_are_known=False).config
    assert isinstance(settled.ladder.steps, list)
    assert [(step.format, step.layers) for step in settled.ladder.steps] == [("w8", "all"), ("w4", "all")]


@pytest.mark.parametrize(
    ("most", "batches"), [(1, (1,)), (2, (1, 2)), (48, (1, 2, 4, 8, 16, 32, 48)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_steps_are_timed_up_to_the_largest(most: int, batches: tuple[int, ...]) -> None:
    """Guards: figures that end at 64 sequences for a server of 256, or go beyond what it admits."""
    assert timed_engine._batches(most) == batches
