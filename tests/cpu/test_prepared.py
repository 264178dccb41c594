"""What was prepared is found by what it was measured of; what is another's, or damaged, is named and not used."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cpu.prepared_world import KEY, NUM_LAYERS, PLACE, keep_profile, keep_times, make_model, store_of
from safetensors.torch import load_file, save_file

from morphserve.config import MorphServeConfig
from morphserve.prepared import (
    SHIPPED,
    Findings,
    ProfileKey,
    Store,
    find_prepared,
    find_profile,
    find_times,
    moment,
    weights_fingerprint,
)
from morphserve.prepared.place import bound_cores
from policies import load_step_times
from quant_layers import read_profile

pytestmark = pytest.mark.cpu


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def store(model: Path, tmp_path: Path) -> Store:
    return store_of(model, tmp_path / "cache")


def profile_of(
    store: Store, wanted: ProfileKey = KEY, variants: dict[str, str] | None = None
) -> tuple[Path | None, Findings]:
    findings = Findings()
    found = find_profile(store, wanted, NUM_LAYERS, variants or {}, findings)
    return (None if found is None else found.directory), findings


# -- which model


def test_a_copy_in_other_files_is_the_same_model(model: Path, tmp_path: Path) -> None:
    """Guards: a profile that is lost when a model is moved, split anew, or touched."""
    name = weights_fingerprint(model)
    assert name is not None and len(name) == 64
    assert weights_fingerprint(make_model(tmp_path / "split", splits=3)) == name
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copyfile)
    assert weights_fingerprint(tmp_path / "copy") == name


def test_other_weights_heads_or_dtype_are_another_model(model: Path, tmp_path: Path) -> None:
    """Guards: what was measured of one model used for another: a merged adapter leaves all norms and shapes as they
    were."""
    names = {weights_fingerprint(model), weights_fingerprint(make_model(tmp_path / "other", seed=1))}
    file = model / "model-0.safetensors"
    tensors = load_file(file)
    merged = {name: tensor + 1e-3 if "down_proj" in name else tensor for name, tensor in tensors.items()}
    for changed in (merged, {name: tensor.half() for name, tensor in tensors.items()}):
        save_file(changed, file)
        names.add(weights_fingerprint(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    names.add(weights_fingerprint(model))
    assert len(names) == 5 and None not in names


@pytest.mark.parametrize("how", ["no file", "cut off", "no header", "no config"])
def test_a_model_that_cannot_be_read_has_no_name(model: Path, how: str) -> None:
    """Guards: a server that does not start because its model is no directory of safetensors."""
    file = model / "model-0.safetensors"
    if how == "no file":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-100_000])
    elif how == "no header":
        file.write_bytes(b"\xff" * 64)
    else:
        (model / "config.json").unlink()
    assert weights_fingerprint(model) is None


# -- profiles


def test_a_profile_of_this_model_is_found(store: Store) -> None:
    """Guards: what was prepared is not used; or is, and nobody is told."""
    assert profile_of(store) == (None, Findings())
    kept = keep_profile(store)
    found, findings = profile_of(store)
    assert found == kept and store.problems == []
    assert findings.not_used == [] and "2026-01-02" in findings.used[0] and "upper bound" not in findings.used[0]


def test_a_profile_of_another_model_is_never_found(store: Store, tmp_path: Path) -> None:
    """Guards: a directory that was renamed, or copied beside another model's, is believed."""
    keep_profile(store)
    keep_times(store)
    other = store_of(make_model(tmp_path / "other", seed=1), tmp_path / "cache")
    shutil.copytree(store.directory, other.directory)
    assert profile_of(other)[0] is None and find_times(other, PLACE, Findings()) is None and other.problems == []


def test_a_profile_of_more_or_fewer_layers_is_not_used(store: Store) -> None:
    """Guards: a model that is served with a part of its layers does not start for its whole profile."""
    kept, findings = keep_profile(store), Findings()
    assert find_profile(store, KEY, NUM_LAYERS - 1, {}, findings) is None
    assert f"{kept} (2 layers instead of 1)" in findings.not_used[0]


@pytest.mark.parametrize(
    ("measured", "int8", "used"),
    [
        (KEY, True, True),  # on tier bf16, rounding activations to 8 bits: an upper bound for fp32 on a lesser tier
        (KEY, False, False),
        (replace(KEY, dtype="float16"), True, False),
        (replace(KEY, tier=""), True, False),  # on a GPU
        (replace(KEY, formats=("fp8", "w4")), True, False),
    ],
)
def test_figures_of_other_kernels_count_only_as_upper_bounds(
    store: Store, measured: ProfileKey, int8: bool, used: bool
) -> None:
    """Guards: a KL that is lower than what is lost here, taken for what is lost here."""
    kept = keep_profile(store, measured, int8=int8)
    found, findings = profile_of(store, ProfileKey(("w8", "w4"), "float32", "avx2"))
    assert (found == kept) is used
    if used:
        assert "upper bound here: it was measured in bfloat16 on tier bf16" in findings.used[0]
    else:
        assert str(kept) in findings.not_used[0]


def test_what_was_measured_here_goes_before_what_comes_along(model: Path, store: Store, tmp_path: Path) -> None:
    """Guards: a user's own profile behind the package's, or behind a bound from another machine that is newer."""
    shipped = tmp_path / "shipped"
    coming_along = keep_profile(store_of(model, tmp_path / "made"), when="2026-03-01")
    shutil.copytree(coming_along.parent, shipped / coming_along.parent.name)
    both = store_of(model, tmp_path / "cache", shipped)
    assert profile_of(both)[0] == shipped / coming_along.parent.name / coming_along.name
    here = replace(KEY, tier="avx2", dtype="float32")
    exact = keep_profile(both, here, int8=False)
    assert profile_of(both, here)[0] == exact
    own = keep_profile(both)
    assert profile_of(both)[0] == own


def test_of_two_that_were_made_on_one_day_the_later_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: levels in a calibrated W4, asked for an hour after those without, that no server takes."""
    sources: tuple[dict[str, str], ...] = ({}, {"w4": "awq"}, {"w4": "gptq"})
    for second, how in enumerate(sources):
        for name in how.values():
            (store.directory / f"w4-{name}").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(time, "gmtime", lambda at=second: time.struct_time((2026, 3, 1, 12, 0, at, 6, 60, 0)))
        kept = keep_profile(store, replace(KEY, sources=how), when=moment())
        assert profile_of(store)[0] == kept


def test_a_profile_with_a_checkpoint_brings_it_along(store: Store) -> None:
    """Guards: levels that are served with other 4 bits than those that were measured."""
    key = replace(KEY, sources={"w4": "awq"})
    kept = keep_profile(store, key)
    found, findings = profile_of(store)
    assert found is None and "w4-awq is gone" in findings.not_used[0]
    (store.directory / "w4-awq").mkdir()
    assert profile_of(store)[0] == kept
    (profile,) = store.profiles()
    assert profile.variants == {"w4": str(store.directory / "w4-awq")}
    found, findings = profile_of(store, variants={"w4": "/mine"})
    assert found is None and "measured without w4 from /mine" in findings.not_used[0]


# -- step times


def test_step_times_are_kept_for_their_user_alone(model: Path, tmp_path: Path) -> None:
    """Guards: a cache directory that the first entry opens to every user of the machine, who may then write there."""
    before = os.umask(0)
    try:
        kept = keep_times(store_of(model, tmp_path / "new" / "cache"))
    finally:
        os.umask(before)
    made = [path for path in kept.parents if path.is_relative_to(tmp_path / "new")]
    assert len(made) > 2 and {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}


def test_step_times_are_those_of_the_place(store: Store) -> None:
    """Guards: predictions from another machine, dtype, topology, vLLM or way to compile."""
    kept = keep_times(store)
    found = find_times(store, PLACE, Findings())
    assert found is not None and found.file == kept and found.formats == ("base", "w8", "w4")
    assert load_step_times(kept).formats.keys() == {"base", "w8", "w4"}
    for change in (
        {"device": "Intel"}, {"tier": "avx2"}, {"cores": "1"}, {"dtype": "float32"}, {"tensor_parallel": 2},
        {"pipeline_parallel": 2}, {"compiled": False}, {"vllm": "0.33.0"},
    ):  # fmt: skip
        findings = Findings()
        assert find_times(store, replace(PLACE, **change), findings) is None
        (key,) = change
        assert f"{key} {getattr(PLACE, key)} instead of {change[key]}" in findings.not_used[0]


def test_step_times_that_lack_a_format_of_the_ladder_are_not_used(store: Store) -> None:
    """Guards: a policy that is to predict a level whose steps nobody has timed, so a server that does not start."""
    kept = keep_times(store)
    for formats, expected, words in ((("w8", "w4"), kept, ""), (("fp8", "w4"), None, "(none of fp8)")):
        findings = Findings()
        found = find_prepared(MorphServeConfig(), store, PLACE, formats, NUM_LAYERS, findings)
        assert found.step_times == expected and words in "".join(findings.not_used)


# -- damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, change, lambda file: file.unlink(), lambda file: file.write_text("[]")])
def test_damage_is_named_and_not_used(store: Store, harm: Callable[[Path], None]) -> None:
    """Guards: a server that does not start, or trusts scales or times that somebody has changed."""
    profile, times = keep_profile(store), keep_times(store)
    harm(profile / "smoothing.safetensors")
    harm(times)
    assert profile_of(store)[0] is None
    assert find_times(store, PLACE, Findings()) is None
    assert any(str(profile) in problem for problem in store.problems)
    assert not times.exists() or any(str(times) in problem for problem in store.problems)


def test_a_cache_that_is_none_holds_nothing(model: Path, tmp_path: Path) -> None:
    """Guards: a cache directory that is a file, or absent, ends the start."""
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "absent"):
        store = store_of(model, cache)
        assert profile_of(store)[0] is None and find_times(store, PLACE, Findings()) is None


def test_there_is_one_line_of_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a start that warns of every entry by itself, or does not say what to do."""
    logger = logging.getLogger("test.prepared")
    with caplog.at_level(logging.INFO, "test.prepared"):
        Findings(["a", "b"], ["c", "d"]).say(logger, "MODEL")
        Findings().say(logger, "MODEL")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "WARNING", "INFO"]
    assert "uses a and b" in caplog.messages[0]
    assert "c; d" in caplog.messages[1] and "`morphserve prepare MODEL`" in caplog.messages[1]
    assert "nothing was prepared" in caplog.messages[2]


@pytest.mark.parametrize(
    ("bound", "cores"),
    [("0", "1"), ("0-2,5|7", "4|1"), ("auto", "auto of 3"), ("nobind", "nobind of 3"), ("", "auto of 3")],
)
def test_cores_are_counted_and_not_named(monkeypatch: pytest.MonkeyPatch, bound: str, cores: str) -> None:
    """Guards: step times of core 0 refused on core 1; those of one core taken for two."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bound)
    assert bound_cores() == cores


# -- what comes along


def test_the_demo_model_comes_prepared(demo_model: Path, tmp_path: Path) -> None:
    """Guards: a demo that loses 0.029 nats per token in W8 instead of 0.011; a profile in the package that is damaged,
    of another conversion of the model, tied to a machine, or large."""
    weights = weights_fingerprint(demo_model)
    assert weights is not None
    store = Store(tmp_path, weights)
    findings = Findings()
    for dtype, tier in (("bfloat16", "bf16"), ("bfloat16", "amx"), ("float32", "avx2")):
        found = find_profile(store, ProfileKey(("w8", "w4"), dtype, tier), 30, {}, findings)
        assert found is not None and found.directory.is_relative_to(SHIPPED)
    assert findings.not_used == store.problems == [] and "upper bound" in findings.used[2]
    profile = read_profile(found.directory)
    assert all(level.step_time_factor is None for level in profile.ladder) and "seconds" not in profile.figures
    (all_w8,) = (level for level in profile.ladder if set(level.layers.values()) == {"w8"} and len(level.layers) == 30)
    assert all_w8.measured_kl is not None and 0.005 < all_w8.measured_kl < 0.015
    assert sum(file.stat().st_size for file in found.directory.iterdir()) < 400_000
