"""From bytes to levels, and what is refused on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from levels import swapped_layers

from morphserve.config import LadderConfig, LadderStep, check_formats, parse_config
from morphserve.control.budget import RankBytes
from morphserve.control.ladder import (
    ProfileLadder,
    build_ladder,
    check_floor,
    ladder_formats,
    optional_formats,
    resolve_level,
    without_formats,
)
from morphserve.errors import ConfigError
from policies import BASE_FORMAT, Ladder
from policies.config import ThresholdConfig
from policies.threshold import fill_in

pytestmark = pytest.mark.cpu

SIZES = {BASE_FORMAT: [100] * 4, "w8": [60] * 4, "w4": [40] * 4}


def build(base_num_blocks: int = 10, max_num_blocks: int | None = None, **fields: object) -> Ladder:
    config = LadderConfig.model_validate(fields)
    return build_ladder(4, [RankBytes(SIZES, 30)], config, base_num_blocks, max_num_blocks)


def test_levels_take_formats_in_order() -> None:
    """Guards: w4 laid beside w8 instead of over it, or the swap order ignored."""
    ladder = build(
        order="back_to_front",
        steps=[{"format": "w8", "layers_per_level": 3}, {"format": "w4", "layers": 1}],
    )
    assert [level.layer_formats for level in ladder] == [
        ("base", "base", "base", "base"),
        ("base", "w8", "w8", "w8"),
        ("w8", "w8", "w8", "w8"),
        ("w8", "w8", "w8", "w4"),
    ]
    assert [level.weight_bytes for level in ladder] == [400, 280, 240, 220]
    assert [level.num_kv_blocks for level in ladder] == [10, 14, 15, 16]
    assert [level.index for level in ladder] == [0, 1, 2, 3]


def test_list_order_may_leave_layers_out() -> None:
    """Guards: 'all' taken for all of the model's layers where the order names fewer."""
    ladder = build(order=[2, 0], steps=[{"format": "w8"}])
    assert ladder[-1].layer_formats == ("w8", "base", "w8", "base")


def test_expected_kl_adds_up_by_layer() -> None:
    """Guards: a quality figure for a format that was never measured, or the wrong share."""
    ladder = build(
        steps=[{"format": "w8"}, {"format": "w4", "layers": 1}], expected_kl={"w8": 0.04, "w4": 0.2}
    )
    assert [level.expected_kl for level in ladder] == pytest.approx([0.0, 0.04, 0.03 + 0.05])
    steps = [{"format": "w8"}, {"format": "w4"}]
    assert build(steps=steps, expected_kl={"w8": 0.04})[-1].expected_kl is None
    assert build()[0].expected_kl == 0.0


def test_max_num_blocks_caps_every_level() -> None:
    """Guards: more blocks published than the user allows."""
    assert max(level.num_kv_blocks for level in build(max_num_blocks=12)) == 12


@given(
    layers=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50)), min_size=1),
    per_level=st.integers(1, 9),
    block_bytes=st.integers(1, 200),
    cap=st.none() | st.integers(20, 60),
)
def test_deeper_is_never_less_kv_and_never_over_budget(
    layers: list[tuple[int, int, int]], per_level: int, block_bytes: int, cap: int | None
) -> None:
    """Guards: a level that would need more memory than level 0 has."""
    sizes = {
        "w4": [w4 for w4, _, _ in layers],
        "w8": [w4 + more for w4, more, _ in layers],
        BASE_FORMAT: [w4 + more + most for w4, more, most in layers],
    }
    steps = [LadderStep(format=fmt, layers_per_level=per_level) for fmt in ("w8", "w4")]
    ladder = build_ladder(len(layers), [RankBytes(sizes, block_bytes)], LadderConfig(steps=steps), 20, cap)
    budget = ladder[0].weight_bytes + 20 * block_bytes
    for shallow, deep in zip(ladder, ladder[1:], strict=False):
        assert deep.num_kv_blocks >= shallow.num_kv_blocks and deep.weight_bytes < shallow.weight_bytes
        assert deep.weight_bytes + deep.num_kv_blocks * block_bytes <= budget


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"order": [0, 7]}, ["[7]", "0 to 3"]),
        ({"order": [0, -1]}, ["[-1]", "0 to 3"]),
        ({"order": [0, 1, 0]}, ["[0]", "more than once"]),
        ({"order": []}, ["empty"]),
        ({"steps": [{"format": "w8", "layers": 5}]}, ["5", "4 decoder layers"]),
        ({"steps": [{"format": "w8", "layers": 0}]}, ["0", "4 decoder layers"]),
        ({"steps": [{"format": "w4"}, {"format": "w8"}]}, ["frees nothing", "wide to narrow"]),
        ({"expected_kl": {"w8": -0.1}}, ["-0.1", "0 or more"]),
        ({"max_num_blocks": 5}, ["5", "10 blocks"]),
    ],
)
def test_refusals_say_value_and_limit(fields: dict[str, object], words: list[str]) -> None:
    """Guards: a ladder that cannot work is found out in the middle of a burst."""
    with pytest.raises(ConfigError) as error:
        build(**fields)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "sizes", [{BASE_FORMAT: [9] * 4}, {**SIZES, "w8": [5] * 3}, {**SIZES, "w8": [0] * 4}]
)
def test_missing_layers_are_refused(sizes: dict[str, list[int]]) -> None:
    """Guards: a model without the expected layers."""
    with pytest.raises(ConfigError, match="decoder layers that MorphServe expects"):
        build_ladder(4, [RankBytes(sizes, 30)], LadderConfig(), 10)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"ladder": {"steps": [{"format": "w8"}, {"format": "int8"}]}}, "ladder.steps[1].format: 'int8'"),
        ({"ladder": {"expected_kl": {"int8": 0.1}}}, "ladder.expected_kl: 'int8'"),
        ({"variants": {"int8": "/models/x"}}, "variants: 'int8'"),
        ({"kernels": {"int8": "fast"}}, "kernels: 'int8'"),
    ],
)
def test_formats_that_do_not_exist_are_refused(fields: dict[str, object], where: str) -> None:
    """Guards: a misspelt format that is silently without effect, or is found out in a worker."""
    config = parse_config(fields)
    with pytest.raises(ConfigError) as error:
        check_formats(config, ("w8", "w4"))
    assert where in str(error.value) and "known are w8, w4" in str(error.value)
    check_formats(config, ("w8", "int8"))
    with pytest.raises(ConfigError, match="String should match pattern"):
        parse_config({"kernels": {"w8/w4": "x"}})


def test_fp8_is_for_who_names_it() -> None:
    """Guards: a ladder that takes by itself what is slow on CPU; an accurate policy that shuns what was named."""
    sizes = {**SIZES, "fp8": [55] * 4}
    taken = build_ladder(4, [RankBytes(sizes, 30)], LadderConfig(expected_kl={"w4": 0.1, "fp8": 0.01}), 10)
    assert {fmt for level in taken for fmt in level.formats} == set(SIZES)
    steps = [{"format": fmt, "layers_per_level": 4} for fmt in ("w8", "fp8", "w4")]
    ladder = build_ladder(4, [RankBytes(sizes, 30)], LadderConfig.model_validate({"steps": steps}), 10)
    assert fill_in(ThresholdConfig(kind="threshold", mode="accuracy"), ladder).max_level == resolve_level(ladder, "fp8")


def test_floor_is_one_longest_request() -> None:
    """Guards: off by the null block."""
    check_floor(17, 512, 32)
    with pytest.raises(
        ConfigError, match="KV cache of 16 blocks .* needs 17 .* lower --max-model-len to 480"
    ):
        check_floor(16, 512, 32)


def test_level_names() -> None:
    """Guards: 'w8' resolved to a level where only some layers are w8."""
    ladder = build(steps=[{"format": "w8", "layers_per_level": 2}, {"format": "w4", "layers_per_level": 2}])
    assert resolve_level(ladder, "w8") == 2
    assert resolve_level(ladder, "w4") == resolve_level(ladder, "deepest") == 4
    assert resolve_level(ladder, 3) == 3 and resolve_level(ladder, "base") == 0
    for spec in (5, -1, "int8"):
        with pytest.raises(ConfigError, match=f"{spec!r}.*0 to 4"):
            resolve_level(ladder, spec)
    with pytest.raises(ConfigError, match=r"are in \(base, w8\)"):
        resolve_level(build(steps=[{"format": "w8"}, {"format": "w4", "layers": 2}]), "w4")


PROFILE = ProfileLadder((2, 0, 3, 1), ({}, {2: "w8", 0: "w8"}, {2: "w4", 0: "w8"}), (0.0, 0.01, 0.04))


def build_with(profile: ProfileLadder, **fields: object) -> Ladder:
    return build_ladder(4, [RankBytes(SIZES, 30)], LadderConfig.model_validate(fields), 10, profile=profile)


@pytest.mark.parametrize("fields", [{}, {"steps": "profile"}, {"order": "profile"}])
def test_levels_of_a_profile_are_taken_as_they_are(fields: dict[str, object]) -> None:
    """Guards: a measured ladder beside another one that is served."""
    ladder = build_with(PROFILE, **fields)
    assert [level.layer_formats for level in ladder] == [
        ("base",) * 4,
        ("w8", "base", "w8", "base"),
        ("w8", "base", "w4", "base"),
    ]
    assert [level.expected_kl for level in ladder] == [0.0, 0.01, 0.04]
    assert [level.num_kv_blocks for level in ladder] == [10, 12, 13]
    assert ladder_formats(LadderConfig.model_validate(fields), PROFILE) == ("w8", "w4")


def test_steps_take_the_profiles_order() -> None:
    """Guards: a user's steps that ignore what was measured about the layers."""
    steps = [{"format": "w8", "layers_per_level": 2}]
    assert swapped_layers(build_with(PROFILE, steps=steps)[1]) == (0, 2)
    assert swapped_layers(build_with(PROFILE, steps=steps, order="front_to_back")[1]) == (0, 1)
    assert ladder_formats(LadderConfig.model_validate({"steps": steps}), PROFILE) == ("w8",)


@pytest.mark.parametrize(
    ("profile", "fields", "words"),
    [
        (None, {"steps": "profile"}, "ladder.steps is 'profile', and there is no profile"),
        (None, {"order": "profile"}, "ladder.order is 'profile', and there is none"),
        (ProfileLadder((0, 1), ({}, {0: "w8"}), (0.0, 0.1)), {}, "2 decoder layers, this one has 4"),
        (ProfileLadder((0, 1, 2, 3), ({}, {0: "w4"}, {0: "w8"}), (0.0, 0.1, 0.2)), {}, "level 2 .* 360 B, .* 340"),
    ],
)
def test_profiles_that_do_not_fit(profile: ProfileLadder | None, fields: dict[str, object], words: str) -> None:
    """Guards: a ladder of another model, or one that shrinks the KV cache on the way down."""
    with pytest.raises(ConfigError, match=words):
        build_ladder(4, [RankBytes(SIZES, 30)], LadderConfig.model_validate(fields), 10, profile=profile)


@pytest.mark.parametrize(
    ("steps", "optional"),
    [
        (None, {"w8"}),
        ([{"format": "w8"}, {"format": "w4"}], set()),
        ([{"format": "w8", "optional": True}, {"format": "w4"}], {"w8"}),
        ([{"format": "w8", "optional": True}, {"format": "w8"}, {"format": "w4", "optional": True}], {"w4"}),
    ],
)
def test_only_what_no_step_insists_on_may_be_left_out(steps: object, optional: set[str]) -> None:
    """Guards: a format that the user named, silently without effect; a default that insists on what cannot run."""
    config = LadderConfig.model_validate({"steps": steps})
    assert optional_formats(config) == optional
    assert optional_formats(LadderConfig(), PROFILE) == frozenset(), "its levels were measured with all of them"


@pytest.mark.parametrize("left_out", [set(), {"w8"}, {"w4"}])
def test_a_ladder_without_a_format_keeps_its_other_steps(left_out: set[str]) -> None:
    """Guards: levels in a format that no kernel runs; steps that lose what else was written in them."""
    written = LadderConfig.model_validate({
        "order": "back_to_front", "expected_kl": {"w8": 0.04, "w4": 0.2},
        "steps": [{"format": fmt, "layers_per_level": 2, "optional": True} for fmt in ("w8", "w4")],
    })  # fmt: skip
    for config in (LadderConfig(expected_kl={"w4": 0.2}), written):
        narrowed = without_formats(config, left_out)
        assert set(ladder_formats(narrowed)) == {"w8", "w4"} - left_out
        ladder = build_ladder(4, [RankBytes(SIZES, 30)], narrowed, 10)
        assert {fmt for level in ladder for fmt in level.formats} == {"base", "w8", "w4"} - left_out
    assert swapped_layers(ladder[1]) == (2, 3) and ladder[-1].expected_kl is not None
