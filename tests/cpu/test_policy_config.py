"""From YAML to a policy: presets, documented defaults, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from morphserve.config import LadderConfig, MorphServeConfig, load_config
from morphserve.control.budget import RankBytes
from morphserve.control.ladder import build_ladder
from policies import (
    Ladder,
    MorphLevel,
    Signals,
    SloConfig,
    StaticConfig,
    StaticPolicy,
    ThresholdConfig,
    ThresholdPolicy,
    build_policy,
    resolve_level,
)
from policies.slo.targets import fill_in as slo_targets
from policies.threshold import fill_in

pytestmark = pytest.mark.cpu

IDLE = Signals(0.0, 0, 0, 20, 0, 0, 0, 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
YAML = Path(__file__).parents[2] / "policies" / "yaml"


def make_ladder(*formats: str, **fields: object) -> Ladder:
    sizes = {"base": [100] * 6, "fp8": [50] * 6, "w8": [50] * 6, "w4": [30] * 6}
    fields.setdefault("steps", [{"format": fmt} for fmt in formats or ("w8", "w4")])
    return build_ladder(6, [RankBytes(sizes, 10)], LadderConfig.model_validate(fields), 20)


@pytest.mark.parametrize("mode", ["default", "accuracy", "performance"])
def test_yaml_files_say_what_the_presets_are(mode: str) -> None:
    """Guards: an annotated default that is not the default."""
    config = load_config(YAML / f"{mode}.yaml")
    ladder = make_ladder()
    assert isinstance(config.policy, SloConfig) and config.policy.mode == mode
    assert slo_targets(config.policy, ladder) == slo_targets(SloConfig(kind="slo", mode=mode), ladder)  # type: ignore[arg-type]
    bare = MorphServeConfig()
    for section in ("ladder", "quality", "kv", "transition", "cache_dir", "decision_log"):
        assert getattr(config, section) == getattr(bare, section)


def test_default_yaml_names_every_key() -> None:
    """Guards: a key that no user can find."""
    text = (YAML / "default.yaml").read_text()
    sections = [
        MorphServeConfig,
        LadderConfig,
        type(MorphServeConfig().quality),
        type(MorphServeConfig().kv),
        type(MorphServeConfig().transition),
    ]
    for model in (*sections, SloConfig):
        for name in model.model_fields:
            assert f"{name}:" in text, f"{model.__name__}.{name}"
    assert all(f"{name}:" in text for name in ThresholdConfig.model_fields), "`init` writes this file alone"
    text = (YAML / "threshold.yaml").read_text()
    assert all(f"{name}:" in text for name in ThresholdConfig.model_fields)


def test_annotated_values_are_the_defaults() -> None:
    """Guards: a file that says another default than the one that holds."""
    ladder = make_ladder()
    policy, thresholds = (load_config(YAML / f"{name}.yaml").policy for name in ("default", "threshold"))
    assert isinstance(policy, SloConfig) and isinstance(thresholds, ThresholdConfig)
    bare = SloConfig(kind="slo")
    filled = {name: None for name in ("target", "horizon_s", "dwell_s", "nats_per_saved_request", "max_level")}
    assert policy.model_copy(update=filled) == bare and slo_targets(policy, ladder) == slo_targets(bare, ladder)
    assert fill_in(thresholds, ladder) == fill_in(ThresholdConfig(kind="threshold"), ladder)


def test_modes_stop_where_they_say() -> None:
    """Guards: mode accuracy reaching w4."""
    ladder = make_ladder()
    w8 = next(level.index for level in ladder if set(level.layer_formats) == {"w8"})
    assert fill_in(ThresholdConfig(kind="threshold", mode="accuracy"), ladder).max_level == w8
    assert fill_in(ThresholdConfig(kind="threshold", mode="default"), ladder).max_level == len(ladder) - 1
    assert fill_in(ThresholdConfig(kind="threshold", max_level=1), ladder).max_level == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_level": 99}, "level 99 .* levels 0 to 4"),
        ({"max_level": "int8"}, "'int8'"),
        ({"degrade_above": 0.5, "target_usage": 0.6}, "target_usage 0.6 is above degrade_above 0.5"),
        ({"degrade_above": 0.7, "restore_below": 0.8}, "restore_below 0.8 is above degrade_above 0.7"),
    ],
)
def test_thresholds_that_cannot_work_are_refused(fields: dict[str, object], words: str) -> None:
    """Guards: a level that swings for ever, or one that the ladder does not have."""
    config = ThresholdConfig.model_validate({"kind": "threshold", **fields})
    with pytest.raises(ValueError, match=words):
        build_policy(config, make_ladder())


LADDERS = {"cpu": ("w8", "w4"), "gpu": ("fp8", "w4"), "w8 alone": ("w8",), "int8 base": ("w4",)}


@pytest.mark.parametrize("on", LADDERS)
def test_bits_mean_the_same_on_every_device(on: str) -> None:
    """Guards: a file that serves on a CPU and is refused on a GPU, or allows there what it forbids here."""
    ladder = make_ladder(*LADDERS[on])
    eight = max(level.index for level in ladder if "w4" not in level.formats)
    assert resolve_level(ladder, "8bit") == eight and (eight > 0) == (on != "int8 base")
    assert resolve_level(ladder, "4bit") == resolve_level(ladder, "3bit") == len(ladder) - 1
    assert resolve_level(ladder, "16bit") == resolve_level(ladder, "9bit") == 0
    assert build_policy(StaticConfig(kind="static", level="8bit"), ladder).decide(IDLE).level == eight
    assert fill_in(ThresholdConfig(kind="threshold", mode="accuracy"), ladder).max_level == eight
    for policy in (load_config(YAML / "accuracy.yaml").policy, SloConfig(kind="slo", mode="accuracy")):
        assert isinstance(policy, SloConfig)
        assert slo_targets(policy, ladder).max_level == eight


def test_a_half_in_fewer_bits_counts() -> None:
    """Guards: 8bit taken for a level whose MLPs have 4."""
    formats = (("base", "base"), ("w8", "w8/base"), ("w8/w4", "w8"), ("w4", "w4"))
    ladder = tuple(MorphLevel(index, row, 1, 1) for index, row in enumerate(formats))
    assert resolve_level(ladder, "8bit") == 1


@pytest.mark.parametrize("name", ["int8", "8 bit", "8bits", "0bit", "bit", "w4"])
def test_an_unknown_level_is_refused_with_those_that_there_are(name: str) -> None:
    """Guards: a misspelt level taken for some other, or refused without a word on what there is."""
    with pytest.raises(ValueError, match=re.escape(f"level {name!r}")) as error:
        resolve_level(make_ladder("w8"), name)
    assert "8bit, 4bit, deepest" in str(error.value) and "(base, w8)" in str(error.value)
    assert "0 to 2" in str(error.value) and "\n" not in str(error.value)


def test_static_never_moves() -> None:
    """Guards: a baseline that reacts to load."""
    policy = build_policy(StaticConfig(kind="static", level="w8"), make_ladder())
    assert isinstance(policy, StaticPolicy)
    busy = Signals(1.0, 0, 0, 20, 19, 9, 9, 9.0, 9, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0)
    assert policy.decide(IDLE) == policy.decide(busy)
    assert policy.decide(IDLE).level == 2
    assert isinstance(build_policy(ThresholdConfig(kind="threshold"), make_ladder()), ThresholdPolicy)
