"""The search space: what may move, and what is refused before a trial runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from cpu import sim_world
from cpu.tuning_world import make_space

from morphserve.config import load_config, parse_config
from morphserve.errors import ConfigError
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.search import distribution_of
from morphserve.tools.tune.space import load_space

pytestmark = pytest.mark.cpu

YAMLS = Path(__file__).resolve().parents[2] / "policies" / "yaml"


def _refused(directory: Path, keys: dict[str, Any], **policy: Any) -> str:
    with pytest.raises(TuningError) as e:
        make_space(directory, keys, **policy)
    return str(e.value)


def test_keys_decide_which_numbers_are_drawn(tmp_path: Path) -> None:
    """Guards: a delay between 0 and 2 seconds is searched at 0, 1 and 2 only, or layers per level become 3.7."""
    space = make_space(
        tmp_path,
        {
            "policy.queue_delay_s": {"low": 0, "high": 2},
            "ladder.steps.1.layers_per_level": {"low": 1, "high": 30, "log": True},
            "policy.max_level": {"low": 1, "high": 3},
            "kv.migrate_blocks_per_step": {"low": 4, "high": 16, "step": 4},
            "policy.mode": {"choices": ["default", "performance"]},
        },
    )
    blocks, layers, level, mode, delay = (distribution_of(p) for p in space.parameters)
    assert delay == optuna.distributions.FloatDistribution(0.0, 2.0)
    assert layers == optuna.distributions.IntDistribution(1, 30, log=True)
    assert level == optuna.distributions.IntDistribution(1, 3)
    assert blocks == optuna.distributions.IntDistribution(4, 16, step=4)
    assert mode == optuna.distributions.CategoricalDistribution(["default", "performance"])


def test_the_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    """Guards: two lines of a space change places, and an unfinished study goes on with other trials."""
    make_space(tmp_path)
    config = sim_world.config()
    keys = ["policy.restore_below", "policy.degrade_above"]
    spaces = []
    for order in (keys, keys[::-1]):
        text = "".join(f"  {key}: {{low: 0.2, high: 0.9}}\n" for key in order)
        (tmp_path / "space.yaml").write_text(f"threshold:\n{text}")
        spaces.append(load_space(tmp_path / "space.yaml", config))
    assert spaces[0] == spaces[1]


def test_values_land_at_their_keys_and_nowhere_else(tmp_path: Path) -> None:
    """Guards: a trial is simulated with the values of another, or writes into the user's decision log."""
    keys = {
        "policy.degrade_above": {"low": 0.5, "high": 1.0, "step": 0.02},
        "ladder.steps.1.layers_per_level": {"low": 1, "high": 30},
    }
    given = sim_world.config().model_copy(update={"decision_log": tmp_path / "log.jsonl"})
    make_space(tmp_path, keys)
    space = load_space(tmp_path / "space.yaml", given)
    config = space.with_values({"policy.degrade_above": 0.8200000000000001, "ladder.steps.1.layers_per_level": 6})
    expected = given.model_dump(mode="json") | {"decision_log": None}
    expected["policy"]["degrade_above"] = 0.82  # what a user would have written
    expected["ladder"]["steps"][1]["layers_per_level"] = 6
    assert config == parse_config(expected)
    assert space.config is given and given.policy == sim_world.config().policy


def test_values_that_do_not_exist_are_a_config_error(tmp_path: Path) -> None:
    """Guards: a combination out of bounds ends the study instead of one trial."""
    space = make_space(tmp_path, {"policy.degrade_above": {"low": 0.5, "high": 1.0}})
    with pytest.raises(ConfigError, match="degrade_above"):
        space.with_values({"policy.degrade_above": 1.5})


@pytest.mark.parametrize(
    ("key", "spec", "words"),
    [
        ("policy.degrade_abov", {"low": 0, "high": 1}, ("not a key", "degrade_above")),
        ("policy.dwell_s", {"low": 0, "high": 1}, ("policy.kind slo", "kind threshold", "section `slo:`")),
        ("degrade_above", {"low": 0, "high": 1}, ("begins with policy.",)),
        ("variants.w8", {"choices": ["a"]}, ("begins with policy.",)),
        ("policy.kind", {"choices": ["slo"]}, ("not to the search", "--config")),
        ("ladder.expected_kl.w8", {"low": 0, "high": 1}, ("not to the search",)),
        ("ladder.steps.7.layers", {"low": 1, "high": 2}, ("no entry '7'", "a list of 2")),
        ("ladder.steps.1.layer", {"low": 1, "high": 2}, ("not a key", "layers_per_level")),
        ("ladder.steps", {"choices": ["profile"]}, ("holds several keys",)),
        ("policy.degrade_above", {"low": 0.9, "high": 0.5}, ("low 0.9 is above high 0.5", "Exchange")),
        ("policy.degrade_above", {"low": 0.5, "high": 1.5}, ("1.5 is out of bounds", "less than or equal to 1")),
        ("policy.queue_delay_s", {"low": 0, "high": 1, "log": True}, ("log needs a low above 0",)),
        ("policy.degrade_above", {"low": 0.5, "high": 0.9, "step": 0.3}, ("do not reach 0.9", "Set high to 0.8")),
        ("policy.degrade_above", {"low": 0.5, "high": 0.9, "step": 0}, ("step is 0", "above 0")),
        ("policy.degrade_above", {"low": 0.5, "high": float("inf")}, ("finite",)),
        ("policy.mode", {"low": 0, "high": 1}, ("takes no numbers", "choices")),
        ("policy.mode", {"choices": ["default", "fast"]}, ("'fast' is out of bounds", "performance")),
        ("policy.max_level", {"choices": ["w8", "w8"]}, ("twice",)),
        ("policy.max_level", {"choices": []}, ("at least 1 item",)),
        ("kv.migrate_blocks_per_step", {"low": 1.5, "high": 4}, ("whole numbers", "1.5")),
        ("policy.degrade_above", {"low": 0.5}, ("high", "Field required")),
        ("policy.degrade_above", {"low": 0.5, "high": 1, "steps": 3}, ("steps", "not permitted")),
    ],
)
def test_bad_spaces_are_refused_with_a_remedy(
    tmp_path: Path, key: str, spec: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Guards: hours are spent on a range that was mistyped, or a message that names neither key nor limit."""
    message = _refused(tmp_path, {key: spec})
    assert message.startswith(f"space {tmp_path / 'space.yaml'}: ")
    for word in words:
        assert word in message


def test_a_space_for_another_kind_or_for_none(tmp_path: Path) -> None:
    """Guards: nothing moves, and every trial is the current policy."""
    make_space(tmp_path)
    slo = sim_world.config(kind="slo")
    with pytest.raises(TuningError, match="nothing to tune for policy.kind slo, only for threshold"):
        load_space(tmp_path / "space.yaml", slo)
    with pytest.raises(TuningError, match="kind static, which has nothing to tune"):
        load_space(tmp_path / "space.yaml", sim_world.config(kind="static", level="w8"))
    (tmp_path / "space.yaml").write_text("")
    with pytest.raises(TuningError, match="1 problem"):
        load_space(tmp_path / "space.yaml", slo)
    with pytest.raises(TuningError, match="No such file"):
        load_space(tmp_path / "gone.yaml", slo)


@pytest.mark.parametrize("kind", ["threshold", "slo"])
def test_the_shipped_space_fits_the_shipped_config(tmp_path: Path, kind: str) -> None:
    """Guards: a key is renamed in the config, and the default space of one kind is refused."""
    raw = yaml.safe_load((YAMLS / "demo.yaml").read_text()) | {"policy": {"kind": kind}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    space = load_space(YAMLS / "space.yaml", load_config(tmp_path / "config.yaml"))
    assert len(space.parameters) >= 5
