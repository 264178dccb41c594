"""Simulations take what a server would find: of the model that was calibrated, and of no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cpu.prepared_world import KEY, NUM_LAYERS, PLACE, TIMES, keep_profile, keep_times, make_model, store_of

from morphserve.config import MorphServeConfig, parse_config
from morphserve.control import RankBytes
from morphserve.prepared import SHIPPED, weights_fingerprint
from morphserve.tools.bench.prepared import stored_times, with_prepared
from morphserve.tools.sim import Calibration, SimServer, load_calibration
from policies import StepTimes

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
SERVER = SimServer()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def calibration(weights: str, times: StepTimes = TIMES) -> Calibration:
    of_bf16 = replace(times, dtype="bfloat16", tier="bf16", machine="AMD EPYC")
    sizes = {fmt: [400, 500] for fmt in times.formats}
    return Calibration(of_bf16, RankBytes(sizes, 64), NUM_LAYERS, 32, weights)


def test_a_simulation_has_the_profile_of_the_calibrated_model(model: Path, tmp_path: Path) -> None:
    """Guards: a simulation of levels that no server has; of another model's, or of formats without times."""
    config = MorphServeConfig(cache_dir=tmp_path / "cache")
    weights = weights_fingerprint(model) or ""
    profile = keep_profile(store_of(model, tmp_path / "cache"), KEY)
    filled = with_prepared(config, calibration(weights), SERVER)
    assert filled.profile == profile and filled.step_times is None
    without_w4 = replace(TIMES, formats={fmt: time for fmt, time in TIMES.formats.items() if fmt != "w4"})
    named = config.model_copy(update={"profile": Path("/mine")})
    not_wanted = config.model_copy(update={"prepared": False})
    for settings, calibrated in (
        (config, calibration("")), (config, calibration("0" * 64)), (config, calibration(weights, without_w4)),
        (named, calibration(weights)), (not_wanted, calibration(weights)),
    ):  # fmt: skip
        assert with_prepared(settings, calibrated, SERVER) == settings


def test_settings_that_a_profile_does_not_fit_are_simulated_without_it(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: a simulation that refuses what a server starts with: a level that the prepared ladder does not have."""
    sections = {"policy": {"kind": "static", "level": "w4"}, "ladder": {"expected_kl": {"w4": 0.1}}}
    config = parse_config({"cache_dir": str(tmp_path / "cache"), **sections})
    keep_profile(store_of(model, tmp_path / "cache"), KEY)
    for _ in range(2):
        assert with_prepared(config, calibration(weights_fingerprint(model) or ""), SERVER) == config
    (said,) = [record.getMessage() for record in caplog.records if "these settings do not fit" in record.getMessage()]
    assert "not used: the profile" in said and "w4" in said


def test_figures_of_the_demo_are_of_the_profile_that_comes_along(tmp_path: Path) -> None:
    """Guards: simulations with the step times of docs/results on a ladder that no server of the demo has."""
    calibrated = load_calibration(ROOT / "docs" / "results" / "step_times.json")
    filled = with_prepared(MorphServeConfig(cache_dir=tmp_path), calibrated, SERVER)
    assert filled.profile is not None and filled.profile.is_relative_to(SHIPPED)


def test_a_calibration_says_of_which_weights_it_is(tmp_path: Path) -> None:
    """Guards: the name of the model lost on the way through the file; files of before that cannot be read."""
    file = tmp_path / "times.json"
    for weights in ("a" * 64, ""):
        calibration(weights).save(file)
        assert load_calibration(file) == calibration(weights)
    file.write_text(file.read_text().replace('"weights": "",', ""))
    assert load_calibration(file).weights == ""


def test_stored_step_times_are_found_for_a_simulation(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: a simulation on this machine that asks for a file which is there; times of another machine or dtype.

    And those of the cores that vLLM chooses, which prepare has, not found for the one core of a replay.
    """
    module = "morphserve.tools.bench.prepared"
    cpu = {"device": "AMD EPYC", "tier": "bf16"}
    monkeypatch.setattr(f"{module}.this_machine", lambda bound: cpu | {"cores": bound or "2"})
    monkeypatch.setattr(f"{module}.vllm_version", lambda: "0.32.0")
    cache = tmp_path / "cache"
    kept = keep_times(store_of(model, cache), PLACE)
    assert stored_times(cache, str(model), "bfloat16", enforce_eager=False) == kept
    assert stored_times(cache, str(model), "float32", enforce_eager=False) is None
    assert stored_times(cache, str(model), "bfloat16", enforce_eager=True) is None
    assert stored_times(cache, str(tmp_path / "no model"), "bfloat16", enforce_eager=False) is None
    assert stored_times(cache, str(model), "bfloat16", enforce_eager=False, cpu_bind="1") == kept
    assert "of cores 2, not 1" in caplog.messages[-1]
    own = keep_times(store_of(model, cache), replace(PLACE, cores="1"))
    caplog.clear()
    assert stored_times(cache, str(model), "bfloat16", enforce_eager=False, cpu_bind="1") == own
    assert not caplog.records
