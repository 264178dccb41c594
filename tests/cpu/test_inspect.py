"""A profile as a user reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from morphserve.__main__ import main
from quant_layers import ProfileLevel, write_profile

pytestmark = pytest.mark.cpu


def test_the_table_says_what_the_levels_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a level's cost beside another level's layers."""
    ladder = (
        ProfileLevel({}, 0.0, 0.0, 0, 1.0),
        ProfileLevel({1: "w8"}, 0.01, 0.012, 2**20, 0.8),
        ProfileLevel({1: "w4", 0: "w8"}, 0.1),
    )
    layer = {"kl": {"w8": 0.001, "w4": 0.02}, "lts": 0.9, "lrs": {"w8": 0.999, "w4": 0.99}}
    figures = {"layers": {"0": layer, "1": layer}}
    scales = {0: {"mlp.down_proj": torch.ones(4)}}
    write_profile(tmp_path / "p", "f" * 64, scales, ladder, (1, 0), {"model": "m", "text": ["a", "b"]}, figures)
    assert main(["inspect", str(tmp_path / "p")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "base ffffffffffffffff, 2 layers" in lines
    assert "made with model m, text a+b" in lines
    assert "order, least harmful first: 1 0" in lines
    assert "0 base - 0.0000 0.0000 0.0 1.00x" in lines
    assert "1 w8 1 1:w8 0.0100 0.0120 1.0 0.80x" in lines
    assert "2 w8 1 w4 1 0:w8 1:w4 0.1000 - 0.0 -" in lines
    assert lines.count("0 0.00100 0.02000 0.900 0.9990 0.9900") == 1


def test_a_damaged_profile_is_an_error_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a stack of frames where one line would do."""
    assert main(["inspect", str(tmp_path)]) == 1
    assert "manifest.json: No such file" in capsys.readouterr().err
