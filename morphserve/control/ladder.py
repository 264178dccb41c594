"""From the `ladder:` section and measured bytes to the ordered levels, and what each costs in time. No torch.

Bytes and blocks are integers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NoReturn

import policies
from morphserve.config import LadderConfig, LadderStep, default_steps, inside_out
from morphserve.control.budget import RankBytes, balance, kv_granularity, paid_blocks, stage_of
from morphserve.errors import ConfigError
from policies import BASE_FORMAT, Ladder, MorphLevel

TIMED_BATCHES = (1, 8, 32)  # sequences in a step: a lone request, a few, a burst

# By format, for each of TIMED_BATCHES: seconds that a layer's linears take, those of its attention, those of its MLP.
LayerTimes = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class ProfileLadder:
    """A profile's statement on a model's ladder, in plain values."""

    order: tuple[int, ...]  # every decoder layer id, least harmful first
    levels: tuple[Mapping[int, str], ...]  # level 0 first: decoder layer id |-> format, full precision left out
    kl: tuple[float, ...]  # nats per token, one a level
    left_out: tuple[float, ...] = ()  # those of levels that cost more than the settings allow

    @property
    def has_levels(self) -> bool:
        """Whether it is a profile with a ladder of its own, even if no level of it is allowed."""
        return bool(self.levels[1:] or self.left_out)


def ladder_formats(config: LadderConfig, profile: ProfileLadder | None = None) -> tuple[str, ...]:
    """Return the formats that the levels use, in the order in which they come in."""
    if levels := _profile_levels(config, profile):
        return tuple(dict.fromkeys(fmt for formats in levels for fmt in formats.values()))
    return tuple(dict.fromkeys(step.format for step in _steps(config)))


def optional_formats(config: LadderConfig, profile: ProfileLadder | None = None) -> frozenset[str]:
    """Return the formats that the ladder does without where no kernel runs them: no step insists on them."""
    if _profile_levels(config, profile):
        return frozenset()
    steps = _steps(config)
    return frozenset(step.format for step in steps) - {step.format for step in steps if not step.optional}


def without_formats(config: LadderConfig, formats: Collection[str]) -> LadderConfig:
    """Return the section without the steps of some formats, not of all; as it is where there are none to leave out."""
    if not formats:
        return config
    return config.model_copy(update={"steps": [step for step in _steps(config) if step.format not in formats]})


def build_ladder(
    num_layers: int,
    ranks: Sequence[RankBytes],
    config: LadderConfig,
    base_num_blocks: int,
    max_num_blocks: int | None = None,
    profile: ProfileLadder | None = None,
) -> Ladder:
    """Build all levels, from full precision to the last step's last layer, or those of the profile.

    One ladder for all ranks: a level publishes the blocks that EVERY rank has freed the bytes of. So that no
    pipeline stage waits for another, steps take layers of all stages in turn, each stage's in the given order.
    The levels of a profile were measured, and are taken as they are.

    Args:
        num_layers: decoder layers of the model.
        ranks: bytes of each layer's morphable linears, by format; must hold 'base' and every format
            the steps use, `num_layers` figures each.
        config: the swap order and the steps.
        base_num_blocks: KV blocks at level 0, null block included.
        max_num_blocks: no level publishes more than this, in whole granularities of blocks.
        profile: of this model, where the section leaves the order or the steps to it.

    Returns:
        Levels with `ladder[k].index == k`; `num_kv_blocks` never decreases, `weight_bytes` never
        increases with k and is the most that any rank holds.

    Raises:
        ConfigError: the section does not fit this model or these bytes.
    """
    _check_blocks(base_num_blocks, ranks, max_num_blocks)
    _check_layer_bytes(num_layers, ranks, ladder_formats(config, profile))
    _check_expected_kl(config.expected_kl)
    if profile is not None and len(profile.order) != num_layers:
        raise ConfigError(
            f"the profile is of a model with {len(profile.order)} decoder layers, this one has {num_layers}. "
            "Make it again with `morphserve profile`, or leave out `profile`."
        )
    known = _profile_levels(config, profile)
    if known:
        assert profile is not None
        levels = [tuple(formats.get(layer, BASE_FORMAT) for layer in range(num_layers)) for formats in known]
        kls: Sequence[float | None] = profile.kl
        _check_sizes(levels, ranks)
    else:
        levels = _levels_of_steps(num_layers, ranks, config, profile)
        kls = [_expected_kl(formats, config.expected_kl) for formats in levels]

    granularity = kv_granularity(ranks)
    if max_num_blocks is not None:
        max_num_blocks -= max_num_blocks % granularity
    ladder = []
    for index, formats in enumerate(levels):
        num_blocks = base_num_blocks + paid_blocks(ranks, levels[0], formats)
        if max_num_blocks is not None:
            num_blocks = min(num_blocks, max_num_blocks)
        ladder.append(MorphLevel(index, formats, max(rank.weight(formats) for rank in ranks), num_blocks, kls[index]))
    return tuple(ladder)


def _steps(config: LadderConfig) -> Sequence[LadderStep]:
    return config.steps if isinstance(config.steps, list) else default_steps(config)


def _profile_levels(config: LadderConfig, profile: ProfileLadder | None) -> tuple[Mapping[int, str], ...]:
    """Return the profile's own levels, empty where the section's steps count."""
    if config.steps == "profile" and (profile is None or not profile.has_levels):
        raise ConfigError(
            "ladder.steps is 'profile', and there is no profile with a ladder. Set `profile` to a directory that "
            "`morphserve profile` made, or list the steps."
        )
    own = config.steps is None and config.order in (None, "profile")
    return profile.levels if profile is not None and (config.steps == "profile" or own) and profile.has_levels else ()


def _check_sizes(levels: Sequence[tuple[str, ...]], ranks: Sequence[RankBytes]) -> None:
    """Refuse a level that takes more than the one before: it would shrink the KV cache on the way down."""
    for rank in ranks:
        sizes = [rank.weight(formats) for formats in levels]
        for level, (before, after) in enumerate(pairwise(sizes), start=1):
            if after > before:
                raise ConfigError(
                    f"level {level} of the profile takes {after} B, level {level - 1} takes {before} B: it was made "
                    "for other kernels. Make it again here with `morphserve profile`, or list ladder.steps."
                )


def _levels_of_steps(
    num_layers: int, ranks: Sequence[RankBytes], config: LadderConfig, profile: ProfileLadder | None
) -> list[tuple[str, ...]]:
    """Return the formats by layer, level by level, as the steps put them."""
    order = _swap_order(num_layers, config.order, profile)
    formats = [BASE_FORMAT] * num_layers
    levels = [tuple(formats)]
    for number, step in enumerate(_steps(config)):
        count = _num_step_layers(num_layers, step, number)
        layers = balance(ranks, order, formats, step.format)[:count]
        for start in range(0, len(layers), step.layers_per_level):
            for layer in layers[start : start + step.layers_per_level]:
                _check_frees(layer, formats[layer], step.format, ranks, number)
                formats[layer] = step.format
            levels.append(tuple(formats))
    return levels


def check_floor(base_num_blocks: int, max_model_len: int, block_size: int, needed: int | None = None) -> None:
    """Refuse a level 0 that could not hold one request of the longest length.

    Args:
        base_num_blocks: KV blocks at level 0, null block included.
        max_model_len: tokens.
        block_size: tokens per block.
        needed: blocks of one request, null block included, where they are not all of one kind.

    Raises:
        ConfigError: fewer blocks than one request of `max_model_len` needs.
    """
    if needed is None:
        needed = -(-max_model_len // block_size) + 1  # the null block holds no tokens
    if base_num_blocks < needed:
        raise ConfigError(
            f"KV cache of {base_num_blocks} blocks at level 0 cannot hold one request: max_model_len "
            f"{max_model_len} needs {needed} blocks of {block_size} tokens (null block included). "
            f"Raise kv.base_num_blocks or the KV cache memory, or lower --max-model-len to "
            f"{max(base_num_blocks - 1, 0) * max_model_len // (needed - 1) // block_size * block_size}."
        )


def resolve_level(ladder: Ladder, spec: int | str) -> int:
    """Return the index of the level that `spec` names, see `policies.resolve_level`.

    Raises:
        ConfigError: no such level.
    """
    try:
        return policies.resolve_level(ladder, spec)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _swap_order(num_layers: int, order: str | list[int] | None, profile: ProfileLadder | None) -> list[int]:
    """Return layer ids in swap order; a list may leave layers out, but not repeat or invent them."""
    if order == "profile" and profile is None:
        raise ConfigError(
            "ladder.order is 'profile', and there is none. Set `profile` to a directory that "
            "`morphserve profile` made, or give ids or 'front_to_back'."
        )
    if order in (None, "profile") and profile is not None:
        return list(profile.order)
    if order is None:
        return inside_out(num_layers)
    if isinstance(order, str):
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
    """Return how many layers the step covers; 'all' means all that `order` names."""
    if step.layers == "all":
        return num_layers
    if not 1 <= step.layers <= num_layers:
        raise ConfigError(
            f"ladder.steps[{number}].layers is {step.layers}, the model has {num_layers} decoder layers. "
            f"Give 1 to {num_layers}, or 'all'."
        )
    return step.layers


def _check_blocks(base_num_blocks: int, ranks: Sequence[RankBytes], max_num_blocks: int | None) -> None:
    """Refuse a block size or a cap that makes no sense."""
    smallest = min(rank.kv_block_bytes for rank in ranks)
    if smallest < 1:
        raise ConfigError(f"kv_block_bytes is {smallest}, must be at least 1. Give one block's bytes.")
    if max_num_blocks is not None and max_num_blocks < base_num_blocks:
        raise ConfigError(
            f"kv.max_num_blocks {max_num_blocks} is below the {base_num_blocks} blocks of level 0. "
            "Raise it, or leave it out."
        )
    granularity = kv_granularity(ranks)
    if base_num_blocks % granularity:
        raise ConfigError(
            f"{base_num_blocks} KV blocks at level 0, but {granularity} of them share memory pages and go together. "
            f"Set kv.base_num_blocks to {max(base_num_blocks // granularity, 1) * granularity}."
        )


def _check_layer_bytes(num_layers: int, ranks: Sequence[RankBytes], formats: Sequence[str]) -> None:
    """Refuse figures of a format in use that are not above 0 on just the ranks that hold the layer."""
    for fmt in (BASE_FORMAT, *formats):
        for rank in ranks:
            figures = rank.layers.get(fmt)
            if figures is None or len(figures) != num_layers:
                _refuse_layer_bytes(num_layers, fmt, "none" if figures is None else str(len(figures)))
        for layer in range(num_layers):
            holders = stage_of(ranks, layer)
            found = [rank.layers[fmt][layer] for rank in ranks]
            if not holders or any((size < 1) is (i in holders) for i, size in enumerate(found)):
                _refuse_layer_bytes(num_layers, fmt, f"{found} for layer {layer}, one figure a rank")


def _refuse_layer_bytes(num_layers: int, fmt: str, found: str) -> NoReturn:
    raise ConfigError(
        f"ladder: format {fmt!r} needs {num_layers} layer sizes of 1 byte or more, found {found}. "
        "Does this model have the decoder layers that MorphServe expects?"
    )


def _check_expected_kl(figures: Mapping[str, float]) -> None:
    negative = {fmt: kl for fmt, kl in figures.items() if not kl >= 0}
    if negative:
        raise ConfigError(f"ladder.expected_kl {negative} must be 0 or more nats per token. Measure again.")


def _check_frees(layer: int, old: str, new: str, ranks: Sequence[RankBytes], number: int) -> None:
    """Refuse a step that makes a layer larger: it would shrink the KV cache on the way down."""
    for rank in ranks:
        before, after = rank.layers[old][layer], rank.layers[new][layer]
        if after > before:
            raise ConfigError(
                f"ladder.steps[{number}] turns layer {layer} from {old} ({before} B) into {new} "
                f"({after} B), which frees nothing. Order the steps from wide to narrow."
            )


def _expected_kl(formats: Sequence[str], figures: Mapping[str, float]) -> float | None:
    """Return nats per token if layers added up independently: each carries its share of the all-layers figure."""
    used = [fmt for fmt in formats if fmt != BASE_FORMAT]
    if any(fmt not in figures for fmt in used):
        return None
    return sum(figures[fmt] for fmt in used) / len(formats)


def with_time_factors(ladder: Ladder, ranks: Sequence[LayerTimes]) -> Ladder:
    """Add the `time_factors` of the rank that a level slows down most, since the others wait for it.

    Args:
        ladder: all levels.
        ranks: of each rank, every format of the ladder and 'base'; as it is where one was not measured.
    """
    if not ranks or not all(ranks):
        return ladder
    base = ladder[0].layer_formats

    def factor(formats: Sequence[str], batch: int) -> float:
        return round(max(_seconds(times, formats, batch) / _seconds(times, base, batch) for times in ranks), 3)

    return tuple(
        replace(level, time_factors=tuple((n, factor(level.layer_formats, i)) for i, n in enumerate(TIMED_BATCHES)))
        for level in ladder
    )


def _seconds(times: LayerTimes, layer_formats: Sequence[str], batch: int) -> float:
    """Return the time of all layers' linears at a batch, given by its place in TIMED_BATCHES."""
    total = 0.0
    for layer_format in layer_formats:
        attention, _, mlp = layer_format.partition("/")
        total += times[attention][batch][0] + times[mlp or attention][batch][1]
    return total
