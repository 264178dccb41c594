"""At start an engine finds what was prepared for it, in the config that all of its processes get."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import quantization_config
from cpu.prepared_world import TIMES, keep_profile, keep_times, make_model, store_of
from vllm.engine.arg_utils import EngineArgs

from morphserve.config import parse_config
from morphserve.integration.offline.served import main as served_main
from morphserve.integration.start import FOUND, for_this_device, ladder_note, read_settings, settings_of
from morphserve.plugin import register
from morphserve.prepared import ProfileKey, Store

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, as vLLM does it; VLLM_PLUGINS is put back after each test."""
    monkeypatch.setenv("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS", ""))
    monkeypatch.delenv("VLLM_PLUGINS")
    register()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """caplog, which our lines reach past vLLM's logger: that is configured anew at a first start."""
    monkeypatch.setattr("morphserve.integration.start.prepared.logger", logging.getLogger("test.prepared"))
    return caplog


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = make_model(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return directory


def start(model: Path, cache: Path, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    """The config of an engine, as far as it comes without weights."""
    additional = {"morphserve": {"cache_dir": str(cache), "policy": {"kind": "static", "level": 0}, **(settings or {})}}
    arguments = {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 128} | more
    return EngineArgs(model=str(model), additional_config=additional, **arguments).create_engine_config()


def prepare(model: Path, cache: Path, config: Any) -> tuple[Path, Path, Store]:
    """Put a profile and step times there, for an engine with that config."""
    store, place = store_of(model, cache), getattr(config, FOUND).place
    profile = keep_profile(store, ProfileKey(("w8", "w4"), place.dtype, place.tier))
    return profile, keep_times(store, place), store


def served(config: Any, settings: dict[str, Any] | None = None) -> tuple[Path | None, Path | None]:
    """The profile and the step times that such an engine uses."""
    stated = read_settings(config.additional_config) if settings is None else parse_config(settings)
    assert stated is not None
    filled = for_this_device(stated, config)
    return filled.profile, filled.step_times


def test_what_was_prepared_is_used_in_every_process(
    model: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Guards: what was prepared is not used; an engine core or a worker that finds something else than the process
    that looked, or when somebody prepares meanwhile; a compiled model that is compiled anew for it."""
    cache = tmp_path / "cache"
    before = start(model, cache)
    assert served(before) == (None, None)
    profile, times, _ = prepare(model, cache, before)
    assert served(before) == (None, None), "what comes later is for the next start"
    with logged.at_level(logging.INFO, "test.prepared"):
        after = start(model, cache)
    for config in (after, copy.deepcopy(after), pickle.loads(pickle.dumps(after))):
        assert served(config) == (profile, times)
    assert after.compute_hash() == before.compute_hash()
    (said,) = [record for record in logged.records if record.name == "test.prepared"]
    assert said.levelname == "INFO" and str(profile) in said.message and str(times) in said.message


def test_what_a_server_would_be_is_asked_without_a_cache(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a model that cannot be prepared into a --cache-dir because the home directory cannot be written to."""
    monkeypatch.setenv("MORPHSERVE_CACHE", "/dev/null/x")
    words = ("--dtype", "bfloat16", "--max-model-len", "128", "--skip-tokenizer-init")
    assert served_main(["--model", str(model), *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["formats"] == ["w8", "w4"]


def test_settings_are_those_of_the_start_in_every_process(model: Path, tmp_path: Path) -> None:
    """Guards: a file that is edited while weights load: another ladder in a rank than in the engine, or a server that
    ends after minutes of loading because it was half written when its door was opened."""
    file = tmp_path / "morph.yaml"
    file.write_text("transition: {max_layers_per_step: 7}\n")
    asked = {"morphserve": {"config_file": str(file)}}
    config = EngineArgs(
        model=str(model), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=128, additional_config=asked
    ).create_engine_config()
    for text in ("transition: {max_layers_per_step: 2}\n", "transition: ["):
        file.write_text(text)
        for each in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            settings = settings_of(each)
            assert settings is not None and settings.transition.max_layers_per_step == 7
    assert settings_of(EngineArgs(model=str(model), skip_tokenizer_init=True).create_engine_config()) is None


@pytest.mark.parametrize(
    "more",
    [{"dtype": "float32"}, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, {"enforce_eager": True}],
    ids=["dtype", "ranks", "eager"],
)
def test_step_times_of_another_way_to_serve_are_not(
    model: Path, tmp_path: Path, logged: pytest.LogCaptureFixture, more: dict[str, Any]
) -> None:
    """Guards: predictions from another dtype, topology or way to compile; and nobody told what to do."""
    cache = tmp_path / "cache"
    prepare(model, cache, start(model, cache))
    with logged.at_level(logging.INFO, "test.prepared"):
        other = start(model, cache, **more)
    assert served(other)[1] is None
    (warning,) = [r.message for r in logged.records if r.levelname == "WARNING" and "not used" in r.message]
    assert "instead of" in warning and f"`morphserve prepare {model}`" in warning


@pytest.mark.parametrize(
    ("asked", "answer"),
    [("this_machine", {"device": "another CPU", "tier": "bf16", "cores": "64"}), ("vllm_version", "0.31.0")],
)
def test_step_times_of_another_machine_are_not(
    model: Path, tmp_path: Path, asked: str, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: predictions from the machine, or the vLLM, on which a cache directory that came along was filled."""
    cache = tmp_path / "cache"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(f"morphserve.integration.start.prepared.{asked}", lambda: answer)
        _, times, _ = prepare(model, cache, start(model, cache))
        assert served(start(model, cache))[1] == times
    assert served(start(model, cache))[1] is None


def test_levels_of_what_was_prepared_that_cost_too_much_are_told_of(model: Path, tmp_path: Path) -> None:
    """Guards: levels that were prepared and are not served, without a word, as the settings name no profile."""
    cache = tmp_path / "cache"
    prepare(model, cache, start(model, cache))
    config = start(model, cache, {"quality": {"max_kl_per_token": 0.015}})
    stated = read_settings(config.additional_config)
    assert stated is not None and stated.profile is None
    assert ladder_note(stated, config)[1].startswith("1 levels of the profile are left out")


def test_adapters_are_served_without_a_prepared_profile(model: Path, tmp_path: Path) -> None:
    """Guards: norms that a profile has smoothed under adapters that were trained on the model's own; a profile that is
    named is refused there."""
    cache = tmp_path / "cache"
    profile, _, _ = prepare(model, cache, start(model, cache))
    assert served(start(model, cache))[0] == profile
    assert served(start(model, cache, enable_lora=True))[0] is None


@pytest.mark.parametrize("settings", [{"prepared": False}, {"profile": "mine", "step_times": "times.json"}])
def test_what_the_settings_say_goes_first(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Guards: a user's own profile replaced behind his back, or no way to do without."""
    cache = tmp_path / "cache"
    config = start(model, cache)
    profile, _, _ = prepare(model, cache, config)
    shutil.copytree(profile, tmp_path / "mine")
    settings = {key: str(tmp_path / value) if value else value for key, value in settings.items()}
    again = start(model, cache, {"prepared": settings.get("prepared", True)})
    named = tuple(Path(path) if path else None for path in (settings.get("profile"), settings.get("step_times")))
    assert served(again, settings) == named


@pytest.mark.parametrize("harm", ["profile", "times", "other weights", "a file", "dummy weights"])
def test_damage_and_other_weights_never_stop_a_start(
    model: Path, tmp_path: Path, logged: pytest.LogCaptureFixture, harm: str
) -> None:
    """Guards: a server that does not start, or uses what it cannot trust, for a cache that is only there to help."""
    cache, more = tmp_path / "cache", {}
    profile, times, store = prepare(model, cache, start(model, cache))
    if harm == "profile":
        (profile / "manifest.json").write_text("{")
        times.unlink()
    elif harm == "times":
        times.write_text("{")
        (profile / "manifest.json").unlink()
    elif harm == "other weights":
        make_model(tmp_path / "other", seed=1)
        (tmp_path / "other" / "model-0.safetensors").replace(model / "model-0.safetensors")
    elif harm == "a file":
        cache = tmp_path / "another"
        cache.mkdir()
        (cache / "prepared").touch()
    else:
        more = {"load_format": "dummy"}
    with logged.at_level(logging.INFO, "test.prepared"):
        assert served(start(model, cache, **more)) == (None, None)
    warnings = [r.message for r in logged.records if r.levelname == "WARNING" and "not used" in r.message]
    assert len(warnings) == (1 if harm in ("profile", "times") else 0)
    assert not warnings or str(store.directory) in warnings[0]


def test_settings_that_a_profile_does_not_fit_are_served_without_it(
    model: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Guards: a server that started until its model was prepared: its ladder has no level that the settings name."""
    cache = tmp_path / "cache"
    policy = {"policy": {"kind": "static", "level": "w4"}, "ladder": {"expected_kl": {"w4": 0.1}}}
    prepare(model, cache, start(model, cache, policy))
    assert served(start(model, cache, policy)) == (None, None)
    (warning,) = [r.message for r in logged.records if r.levelname == "WARNING" and "not used" in r.message]
    assert "these settings do not fit" in warning


def test_a_model_of_8_bits_has_its_step_times_and_is_told_of_nothing_else(
    model: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Guards: who serves int8 weights told to measure a profile that is never used there; step times that are refused
    for want of w8, which such a ladder cannot have."""
    (model / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization_config("ct_int8", 0)}))
    cache, expected = tmp_path / "cache", {"ladder": {"expected_kl": {"w4": 0.1}}}
    with logged.at_level(logging.INFO, "test.prepared"):
        config = start(model, cache)
    assert [record.message for record in logged.records if record.name == "test.prepared"] == []
    stated = read_settings(config.additional_config)
    assert stated is not None
    note = ladder_note(stated, config)[1]
    assert "`morphserve measure-kl MODEL --formats w4` does" in note and "prepare" not in note
    formats = {fmt: time for fmt, time in TIMES.formats.items() if fmt != "w8"}
    store, place = store_of(model, cache), getattr(config, FOUND).place
    kept = store.keep_times(replace(TIMES, formats=formats).document(), place, "2026-01-02")
    keep_profile(store, ProfileKey(("w4",), place.dtype, place.tier))
    assert served(start(model, cache, expected)) == (None, kept)


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ({"machine": "Another CPU"}, "machine Another CPU instead of"),
        ({"dtype": "float32"}, "dtype float32 instead of"),
        ({"cores": "1 of another"}, "cores 1 of another instead of"),
        ({}, ""),
    ],
    ids=["machine", "dtype", "cores", "nobody knows"],
)
def test_named_step_times_of_elsewhere_are_served_with_a_warning(
    model: Path, tmp_path: Path, logged: pytest.LogCaptureFixture, taken: dict[str, str], said: str
) -> None:
    """Guards: a calibration that was copied from another machine, and predicts from there without a word."""
    file = tmp_path / "times.json"
    file.write_text(json.dumps(replace(TIMES, **taken).document()))
    settings = {"step_times": str(file), "policy": {"kind": "slo"}}
    assert served(start(model, tmp_path / "cache", settings))[1] == file
    warnings = [r.message for r in logged.records if r.levelname == "WARNING" and r.name == "test.prepared"]
    assert len(warnings) == bool(said) and all(said in each and str(file) in each for each in warnings)
