"""The file that calibration leaves and a simulation reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu.sim_world import CALIBRATION, SERVER, TIMES, config

from morphserve.config import MorphServeConfig
from morphserve.errors import ConfigError
from morphserve.tools.sim import load_calibration
from morphserve.tools.sim.morphing import plan_ladder
from policies import load_step_times

SIZES = {"layers": {"base": [5]}, "kv_block_bytes": 1, "block_size": 1}


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    """Guards: a figure that is lost on the way, or a file that the serving policy cannot read."""
    path = tmp_path / "times.json"
    CALIBRATION.save(path)
    assert load_calibration(path) == CALIBRATION
    assert load_step_times(path) == TIMES
    assert [file.name for file in tmp_path.iterdir()] == ["times.json"], "parts are left over"


def test_kv_blocks_of_another_size() -> None:
    """Guards: a ladder of blocks that cost what other blocks cost."""
    assert CALIBRATION.rank_with(16).kv_block_bytes * 2 == CALIBRATION.rank_with(32).kv_block_bytes == 737_280


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_bytes": None}, "NoneType"),
        ({"model_bytes": {"layers": {"base": [5]}, "kv_block_bytes": 1}}, "'block_size' is missing"),
        ({"model_bytes": {**SIZES, "layers": {"w8": [5]}}}, "no bytes of 'base'"),
        ({"model_bytes": {**SIZES, "layers": {"base": [5], "w8": [5, 5]}}}, "'w8' has 2 layers"),
        ({"model_bytes": {**SIZES, "layers": {"base": [0]}}}, "1 byte or more"),
        ({"model_bytes": {**SIZES, "kv_block_bytes": 0.5}}, "kv_block_bytes is 0.5"),
        ({"schema": 99}, "schema 99"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Guards: a traceback, or a simulation of nonsense, as the answer to a file of somebody's own making."""
    path = tmp_path / "times.json"
    CALIBRATION.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as error:
        load_calibration(path)
    assert "morphserve calibrate" in str(error.value)


def test_step_times_alone_are_no_calibration(tmp_path: Path) -> None:
    """Guards: a KeyError for a file that serves well."""
    path = tmp_path / "times.json"
    path.write_text(json.dumps(replace(TIMES, model="m").document()))
    with pytest.raises(ConfigError, match="no 'model_bytes'"):
        load_calibration(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_calibration(tmp_path / "none.json")


def test_levels_know_what_was_calibrated() -> None:
    """Guards: a simulated policy that does not see which level is slow, as the serving one does."""
    ladder = plan_ladder(config(), SERVER, CALIBRATION, None)
    assert ladder[0].time_factors == ((1, 1.0), (8, 1.0), (32, 1.0))
    assert ladder[1].time_factors == ((1, 0.589), (8, 0.618), (32, 0.669)), "all layers w8: 16.6 over 24.8 ms at 32"
    assert ladder[-1].time_factors[2] == (32, 1.097)


def test_a_format_that_the_calibrated_engine_left_out() -> None:
    """Guards: default settings that cannot be simulated with what was measured under them; a named format, dropped."""
    kept = {fmt: times for fmt, times in TIMES.formats.items() if fmt != "w4"}
    without = replace(CALIBRATION, times=replace(TIMES, formats=kept))
    ladder = plan_ladder(MorphServeConfig(), SERVER, without, None)
    assert {fmt for level in ladder for fmt in level.formats} == {"base", "w8"}
    with pytest.raises(ConfigError, match="step times of format 'w4' are not known"):
        plan_ladder(config(), SERVER, without, None)
