"""The ladder that nobody wrote down: by device and base, by what was measured, and by what a token may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.config import Device, MorphServeConfig, Settled, inside_out, load_config, max_kl, parse_config, settle
from morphserve.control.budget import RankBytes, largest_batch_bytes, make_ledgers
from morphserve.control.ladder import ProfileLadder, build_ladder, ladder_formats
from morphserve.profile_ladder import read_ladder
from policies import EngineLimits, Ladder, LayerMove, PolicySetup, Signals, StepTime, StepTimes
from quant_layers import ProfileLevel, write_profile

pytestmark = pytest.mark.cpu

CPU, GPU = Device(30), Device(32, ("fp8", "w4"), 16)
YAML = Path(__file__).parents[2] / "policies" / "yaml"
AWQ, ROUNDED = {"w8": 0.0289, "w4": 0.109}, {"w8": 0.0289, "w4": 0.3061}  # docs/profiling.md, docs/slo.md


def settled(device: Device = CPU, levels_are_known: bool = False, **sections: Any) -> Settled:
    return settle(parse_config(sections), device, levels_are_known)


def steps_of(found: Settled) -> list[tuple[str, int | str]]:
    assert isinstance(found.config.ladder.steps, list)
    return [(step.format, step.layers) for step in found.config.ladder.steps]


def ladder_of(config: MorphServeConfig, num_layers: int = 30) -> Ladder:
    sizes = {"base": [160] * num_layers, "fp8": [82] * num_layers, "w8": [80] * num_layers, "w4": [44] * num_layers}
    return build_ladder(num_layers, [RankBytes(sizes, 10)], config.ladder, 20)


@pytest.mark.parametrize(
    ("device", "steps"),
    [(CPU, [("w8", "all")]), (GPU, [("fp8", "all")]), (Device(30, ("w4",)), []), (Device(30, base_bits=8), [])],
)
def test_unmeasured_it_goes_down_to_8_bits(device: Device, steps: list[tuple[str, str]]) -> None:
    """Guards: 4 bits, at a cost that nobody knows, for who asked for nothing; a step over a base of 8 bits, which frees
    nothing and stops the start; a server that never morphs and does not say so; one of 8 bits told to prepare what is
    never used there."""
    found = settled(device)
    assert steps_of(found) == steps
    assert "no w4: nobody has measured" in found.note
    assert ("morphserve prepare" in found.note) != ("measure-kl MODEL --formats w4" in found.note)
    assert ("morphserve prepare" in found.note) == (device.base_bits > 8)
    assert found.is_warning == (not steps) == ("level 0 is the only level" in found.note)
    assert ("8 bits already" in found.note) == (device.base_bits == 8)
    per_format = -(-device.num_layers // device.layers_per_level)
    assert len(ladder_of(found.config, device.num_layers)) == 1 + len(steps) * per_format


@pytest.mark.parametrize("device", [CPU, GPU, Device(30, base_bits=8)])
def test_measured_4_bits_come_in_behind_8(device: Device) -> None:
    """Guards: W4 that is cheap enough, and never used."""
    found = settled(device, ladder={"expected_kl": {**AWQ, "fp8": 0.01}})
    eight = [fmt for fmt in device.formats if fmt != "w4" and device.base_bits > 8]
    assert steps_of(found) == [(fmt, "all") for fmt in (*eight, "w4")]
    assert (found.note, found.is_warning) == ("", False)


def test_the_cap_stops_where_a_token_costs_too_much() -> None:
    """Guards: round-to-nearest W4 on all layers, or a cap that W8 rounded to nearest does not pass."""
    found = settled(ladder={"expected_kl": ROUNDED})
    assert steps_of(found) == [("w8", "all"), ("w4", 13)]
    levels = [level.expected_kl for level in ladder_of(found.config)]
    assert levels[6] == pytest.approx(0.0289) and max(filter(None, levels)) <= max_kl(found.config) == 0.15
    assert (0.0289 * 16 + 0.3061 * 14) / 30 > 0.15, "one layer more would not be allowed"
    assert "w4 on 13 layers of 30 is what quality.max_kl_per_token 0.15 allows" in found.note and not found.is_warning


def test_a_strict_cap_leaves_level_0_and_says_so() -> None:
    """Guards: an empty ladder without a word."""
    found = settled(ladder={"expected_kl": {"w8": 0.9}}, quality={"max_kl_per_token": 0.01})
    assert steps_of(found) == [] and found.is_warning and "w8 on 0 layers of 30" in found.note
    assert len(ladder_of(found.config)) == 1


@pytest.mark.parametrize("section", [{"kind": "threshold"}, {"kind": "threshold", "mode": "accuracy"}, {"kind": "slo"}])
def test_level_0_alone_can_be_served(section: dict[str, str]) -> None:
    """Guards: a start that fails where there is nothing to swap, or a policy that asks for a level that is not."""
    sizes = {"base": [160] * 30}
    ladder = build_ladder(30, [RankBytes(sizes, 10)], settled(Device(30, base_bits=8)).config.ladder, 20)
    ledgers = make_ledgers(ladder, [RankBytes(sizes, 10)], [largest_batch_bytes(sizes, 5)])
    assert (len(ladder), ledgers[0].budget_bytes) == (1, 160 * 30 + 20 * 10)
    times = StepTimes({"base": StepTime(0.012, 0.0004, 0.00025, 1.2e-6)}, LayerMove(0.001, 0.002))
    policy = PolicySetup(parse_config({"policy": section}).policy, times, EngineLimits(32, 16, 2048)).build(ladder)
    for second in range(9):
        busy = Signals(float(second), 0, 0, 20, 19, 9, 9, 9.0, second, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0)
        assert policy.decide(busy).level == 0


def test_listed_steps_are_the_users_own() -> None:
    """Guards: a ladder that somebody wrote, shortened by a default; one that he capped himself, not shortened."""
    steps = [{"format": "w8"}, {"format": "w4", "layers": 20}]
    for name in ("demo", "default"):
        config = load_config(YAML / f"{name}.yaml")
        assert (settle(config, CPU, False).config == config) == isinstance(config.ladder.steps, list)
    written = settled(ladder={"steps": steps, "expected_kl": ROUNDED})
    assert steps_of(written) == [("w8", "all"), ("w4", 20)] and not written.note
    capped = settled(ladder={"steps": steps, "expected_kl": ROUNDED}, quality={"max_kl_per_token": 0.1})
    assert steps_of(capped) == [("w8", "all"), ("w4", 7)]
    unknown = settled(ladder={"steps": steps}, quality={"max_kl_per_token": 0.1})
    assert steps_of(unknown) == [("w8", "all")] and "no w4" in unknown.note
    some = settled(ladder={"order": [3, 1], "expected_kl": AWQ}).config
    assert steps_of(Settled(some)) == [("w8", "all"), ("w4", "all")] and len(ladder_of(some)) == 3


def write(directory: Path, kls: list[float]) -> MorphServeConfig:
    levels = [ProfileLevel({i: "w8" if n < 3 else "w4" for i in range(n)}, kl, None, n) for n, kl in enumerate(kls)]
    write_profile(directory / "profile", "norms", {}, levels, range(4), {}, {})
    return parse_config({"profile": str(directory / "profile")})


def test_levels_of_a_profile_are_cut(tmp_path: Path) -> None:
    """Guards: measured levels that cost too much are served, or their formats packed for nothing; levels that the
    default ladder would have, in the place of those that were measured as too dear."""
    config = write(tmp_path, [0.0, 0.01, 0.02, 0.149, 0.3])
    profile = read_ladder(config)
    assert profile is not None and profile.kl == (0.0, 0.01, 0.02, 0.149) and profile.left_out == (0.3,)
    strict = config.model_copy(update={"quality": parse_config({"quality": {"max_kl_per_token": 0.02}}).quality})
    profile = read_ladder(strict)
    assert profile is not None and profile.kl == (0.0, 0.01, 0.02), "the cap itself is allowed"
    assert ladder_formats(config.ladder, profile) == ("w8",)
    none = config.model_copy(update={"quality": parse_config({"quality": {"max_kl_per_token": 0.001}}).quality})
    profile = read_ladder(none)
    assert profile is not None and profile.has_levels and ladder_formats(none.ladder, profile) == ()
    assert settle(none, Device(4), profile.has_levels).config == none
    assert len(build_ladder(4, [RankBytes({"base": [9] * 4}, 3)], none.ladder, 10, profile=profile)) == 1


@given(st.integers(1, 130))
def test_the_free_order_has_every_layer_once_and_the_last_last(num_layers: int) -> None:
    """Guards: a layer that is never swapped, or twice."""
    order = inside_out(num_layers)
    assert sorted(order) == list(range(num_layers)) and order[-1] == num_layers - 1
    assert num_layers < 4 or order.index(0) == num_layers - 2, "the first layer is the last but one"


def test_the_order_is_the_profiles_the_users_or_inside_out() -> None:
    """Guards: an order that somebody measured or wrote, lost for one that nobody did."""
    profile = ProfileLadder((2, 0, 3, 1), (), ())
    sizes = [RankBytes({"base": [9] * 4, "w8": [5] * 4}, 3)]

    def first(profile: ProfileLadder | None = None, **fields: Any) -> int:
        section = parse_config({"ladder": {"steps": [{"format": "w8", "layers_per_level": 1}], **fields}}).ladder
        return build_ladder(4, sizes, section, 10, profile=profile)[1].layer_formats.index("w8")

    assert (first(), first(profile), first(profile, order="front_to_back"), first(order=[1, 3])) == (2, 2, 0, 1)
    assert first(ProfileLadder((1, 0, 3, 2), (), ())) == 1
