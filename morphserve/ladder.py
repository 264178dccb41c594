"""From the `ladder:` section and measured bytes to the ordered levels. Integers only, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import policies.levels
from morphserve.config import LadderConfig, LadderStep
from morphserve.errors import ConfigError
from policies.types import BASE_FORMAT, Ladder, MorphLevel

LayerBytes = Mapping[str, Sequence[int]]  # format -> bytes of each decoder layer on one rank
# What a ladder takes by itself: fast wherever MorphServe serves. No list of all formats: fp8 is slow on CPU, and a new
# one is for who names it.
DEFAULT_FORMATS = ("w8", "w4")
_DEFAULT_STEPS = tuple(LadderStep(format=fmt) for fmt in DEFAULT_FORMATS)


@dataclass(frozen=True, slots=True)
class ProfileLadder:
    """What a profile says about a model's ladder, in plain values."""

    order: tuple[int, ...]  # every decoder layer id, least harmful first
    rungs: tuple[Mapping[int, str], ...]  # level 0 first: decoder layer id |-> format, full precision left out
    kl: tuple[float, ...]  # nats per token, one a rung


def ladder_formats(config: LadderConfig, profile: ProfileLadder | None = None) -> tuple[str, ...]:
    """Formats that the levels use, in the order in which they come in."""
    if rungs := _profile_rungs(config, profile):
        return tuple(dict.fromkeys(fmt for rung in rungs for fmt in rung.values()))
    return tuple(dict.fromkeys(step.format for step in _steps(config)))


def build_ladder(
    num_layers: int,
    layer_bytes: LayerBytes,
    config: LadderConfig,
    base_num_blocks: int,
    kv_block_bytes: int,
    max_num_blocks: int | None = None,
    profile: ProfileLadder | None = None,
) -> Ladder:
    """All levels, from full precision to the last step's last layer, or those of the profile.

    Args:
        num_layers: decoder layers of the model.
        layer_bytes: bytes on one rank of each layer's morphable linears, by format; must hold
            'base' and every format the steps use, `num_layers` figures each.
        config: the swap order and the steps.
        base_num_blocks: KV blocks at level 0, null block included.
        kv_block_bytes: bytes of one KV block on one rank, all layers together.
        max_num_blocks: no level publishes more than this.
        profile: of this model, where the section leaves the order or the steps to it.

    Returns:
        Levels with `ladder[k].index == k`; `num_kv_blocks` never decreases, `weight_bytes` never
        increases with k.

    Raises:
        ConfigError: the section does not fit this model or these bytes.
    """
    _check_blocks(base_num_blocks, kv_block_bytes, max_num_blocks)
    _check_layer_bytes(num_layers, layer_bytes, ladder_formats(config, profile), config.expected_kl)
    if profile is not None and len(profile.order) != num_layers:
        raise ConfigError(
            f"the profile is of a model with {len(profile.order)} decoder layers, this one has {num_layers}. "
            "Make it again with scripts/profile_layers.py, or leave out `profile`."
        )
    known = _profile_rungs(config, profile)
    if known:
        assert profile is not None
        rungs = [tuple(rung.get(layer, BASE_FORMAT) for layer in range(num_layers)) for rung in known]
        kls: Sequence[float | None] = profile.kl
        _check_rungs(rungs, layer_bytes)
    else:
        rungs = _rungs_of_steps(num_layers, layer_bytes, config, profile)
        kls = [_expected_kl(rung, config.expected_kl) for rung in rungs]

    def weight(rung: tuple[str, ...]) -> int:
        return sum(layer_bytes[fmt][layer] for layer, fmt in enumerate(rung))

    base_bytes = weight(rungs[0])
    ladder = []
    for index, rung in enumerate(rungs):
        num_blocks = base_num_blocks + (base_bytes - weight(rung)) // kv_block_bytes
        if max_num_blocks is not None:
            num_blocks = min(num_blocks, max_num_blocks)
        ladder.append(MorphLevel(index, rung, weight(rung), num_blocks, kls[index]))
    return tuple(ladder)


def _steps(config: LadderConfig) -> Sequence[LadderStep]:
    return config.steps if isinstance(config.steps, list) else _DEFAULT_STEPS


def _profile_rungs(config: LadderConfig, profile: ProfileLadder | None) -> tuple[Mapping[int, str], ...]:
    """The profile's own levels, empty where the section's steps count."""
    if config.steps == "profile" and (profile is None or len(profile.rungs) < 2):
        raise ConfigError(
            "ladder.steps is 'profile', and there is no profile with a ladder. Set `profile` to a directory that "
            "scripts/profile_layers.py made, or list the steps."
        )
    own = config.steps is None and config.order in (None, "profile")
    return profile.rungs if profile is not None and (config.steps == "profile" or own) and profile.rungs[1:] else ()


def _check_rungs(rungs: Sequence[tuple[str, ...]], layer_bytes: LayerBytes) -> None:
    """A level that takes more than the one before would shrink the KV cache on the way down: refuse it."""
    sizes = [sum(layer_bytes[fmt][layer] for layer, fmt in enumerate(rung)) for rung in rungs]
    for level, (before, after) in enumerate(pairwise(sizes), start=1):
        if after > before:
            raise ConfigError(
                f"level {level} of the profile takes {after} B, level {level - 1} takes {before} B: it was made for "
                "other kernels. Make it again here with scripts/profile_layers.py, or list ladder.steps."
            )


def _rungs_of_steps(
    num_layers: int, layer_bytes: LayerBytes, config: LadderConfig, profile: ProfileLadder | None
) -> list[tuple[str, ...]]:
    """Formats by layer, level by level, as the steps put them."""
    order = _swap_order(num_layers, config.order, profile)
    formats = [BASE_FORMAT] * num_layers
    rungs = [tuple(formats)]
    for number, step in enumerate(_steps(config)):
        layers = order[: _num_step_layers(num_layers, step, number)]
        for start in range(0, len(layers), step.layers_per_level):
            for layer in layers[start : start + step.layers_per_level]:
                _check_frees(layer, formats[layer], step.format, layer_bytes, number)
                formats[layer] = step.format
            rungs.append(tuple(formats))
    return rungs


def check_floor(base_num_blocks: int, max_model_len: int, block_size: int) -> None:
    """Refuse a level 0 that could not hold one request of the longest length.

    Args:
        base_num_blocks: KV blocks at level 0, null block included.
        max_model_len: tokens.
        block_size: tokens per block.

    Raises:
        ConfigError: fewer blocks than one request of `max_model_len` needs.
    """
    needed = -(-max_model_len // block_size) + 1  # the null block holds no tokens
    if base_num_blocks < needed:
        raise ConfigError(
            f"KV cache of {base_num_blocks} blocks at level 0 cannot hold one request: max_model_len "
            f"{max_model_len} needs {needed} blocks of {block_size} tokens (null block included). "
            f"Raise kv.base_num_blocks or the KV cache memory, or lower --max-model-len to "
            f"{max(base_num_blocks - 1, 0) * block_size}."
        )


def resolve_level(ladder: Ladder, spec: int | str) -> int:
    """Index of the level that `spec` names: an index, 'deepest', or a format all layers are in.

    Raises:
        ConfigError: no such level.
    """
    try:
        return policies.levels.resolve_level(ladder, spec)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _swap_order(num_layers: int, order: str | list[int] | None, profile: ProfileLadder | None) -> list[int]:
    """Layer ids in swap order; a list may leave layers out, but not repeat or invent them."""
    if order == "profile" and profile is None:
        raise ConfigError(
            "ladder.order is 'profile', and there is none. Set `profile` to a directory that "
            "scripts/profile_layers.py made, or give ids or 'front_to_back'."
        )
    if order in (None, "profile") and profile is not None:
        return list(profile.order)
    if order is None or isinstance(order, str):
        ids = list(range(num_layers))
        return ids[::-1] if order == "back_to_front" else ids
    unknown = sorted({layer for layer in order if not 0 <= layer < num_layers})
    if unknown:
        raise ConfigError(
            f"ladder.order names layers {unknown}, the model has layers 0 to {num_layers - 1}. Remove them."
        )
    twice = sorted({layer for layer in order if order.count(layer) > 1})
    if twice:
        raise ConfigError(f"ladder.order names layers {twice} more than once. Name each layer once.")
    if not order:
        raise ConfigError("ladder.order is an empty list, it must name a layer. Give ids or 'front_to_back'.")
    return list(order)


def _num_step_layers(num_layers: int, step: LadderStep, number: int) -> int:
    """Layers the step covers; 'all' means all that `order` names."""
    if step.layers == "all":
        return num_layers
    if not 1 <= step.layers <= num_layers:
        raise ConfigError(
            f"ladder.steps[{number}].layers is {step.layers}, the model has {num_layers} decoder layers. "
            f"Give 1 to {num_layers}, or 'all'."
        )
    return step.layers


def _check_blocks(base_num_blocks: int, kv_block_bytes: int, max_num_blocks: int | None) -> None:
    """Block size and cap make sense."""
    if kv_block_bytes < 1:
        raise ConfigError(f"kv_block_bytes is {kv_block_bytes}, must be at least 1. Give one block's bytes.")
    if max_num_blocks is not None and max_num_blocks < base_num_blocks:
        raise ConfigError(
            f"kv.max_num_blocks {max_num_blocks} is below the {base_num_blocks} blocks of level 0. "
            "Raise it, or leave it out."
        )


def _check_layer_bytes(
    num_layers: int, layer_bytes: LayerBytes, formats: Sequence[str], expected_kl: Mapping[str, float]
) -> None:
    """Every format in use has one positive figure per layer, and no KL figure is negative."""
    for fmt in (BASE_FORMAT, *formats):
        figures = layer_bytes.get(fmt)
        if figures is None or len(figures) != num_layers or min(figures, default=0) < 1:
            found = "none" if figures is None else f"{len(figures)}, least {min(figures, default=0)}"
            raise ConfigError(
                f"ladder: format {fmt!r} needs {num_layers} layer sizes of 1 byte or more, found {found}. "
                "Does this model have the decoder layers that MorphServe expects?"
            )
    negative = {fmt: kl for fmt, kl in expected_kl.items() if not kl >= 0}
    if negative:
        raise ConfigError(f"ladder.expected_kl {negative} must be 0 or more nats per token. Measure again.")


def _check_frees(layer: int, old: str, new: str, layer_bytes: LayerBytes, number: int) -> None:
    """A step that makes a layer larger would shrink the KV cache on the way down: refuse it."""
    if layer_bytes[new][layer] > layer_bytes[old][layer]:
        raise ConfigError(
            f"ladder.steps[{number}] turns layer {layer} from {old} ({layer_bytes[old][layer]} B) into {new} "
            f"({layer_bytes[new][layer]} B), which frees nothing. Order the steps from wide to narrow."
        )


def _expected_kl(rung: Sequence[str], figures: Mapping[str, float]) -> float | None:
    """Nats per token if layers added up independently: each carries its share of the all-layers figure."""
    used = [fmt for fmt in rung if fmt != BASE_FORMAT]
    if any(fmt not in figures for fmt in used):
        return None
    return sum(figures[fmt] for fmt in used) / len(rung)
