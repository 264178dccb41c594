"""The levels that nobody wrote down, and what `quality.max_kl_per_token` leaves of those that somebody has measured.

Nobody can tell what a format costs a model until it is measured on that model. Eight bits cost every model little and
are taken unmeasured; fewer only with a figure, and only as far as the cap allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from morphserve.config.sections import LadderConfig, LadderStep, MorphServeConfig
from policies import bits_of

# What a ladder may take by itself on a CPU, widest first: fast on every one that MorphServe serves on. No list of all
# formats: fp8 is slow there, and a new one is for who names it.
DEFAULT_FORMATS = ("w8", "w4")
_MAX_KL_PER_TOKEN = 0.15  # where nobody gives one; docs/profiling.md says why
_TRUSTED_BITS = 8
_CENTRE = 0.75  # of the depth: where the order that nobody measured begins
_TOLERANCE = 1e-9  # of sums of shares


@dataclass(frozen=True, slots=True)
class Device:
    """What of the device and the model the default ladder follows.

    Attributes:
        num_layers: decoder layers of the model.
        formats: that run fast on the device, widest first.
        layers_per_level: of the default steps.
        base_bits: of the model's own weights.
    """

    num_layers: int
    formats: Sequence[str] = DEFAULT_FORMATS
    layers_per_level: int = 5
    base_bits: int = 16


@dataclass(frozen=True, slots=True)
class Settled:
    """The settings with the steps that they mean, and what a user should know of them, in one line."""

    config: MorphServeConfig
    note: str = ""
    is_warning: bool = False


def max_kl(config: MorphServeConfig) -> float:
    """Return the expected KL per token above which a level is left out that nobody wrote by hand."""
    cap = config.quality.max_kl_per_token
    return _MAX_KL_PER_TOKEN if cap is None else cap


def default_steps(section: LadderConfig) -> list[LadderStep]:
    """Return the steps that nobody wrote down, where nothing is known of device and model.

    Eight bits on all layers, and fewer only in a format that somebody has measured.
    """
    return [step for step in _smaller(Device(0)) if _is_trusted(step.format, section)]


def inside_out(num_layers: int) -> list[int]:
    """Return layer ids in the swap order that costs nothing to know: from three quarters of the depth, the last last.

    What a layer adds is largest beside what it adds to in the first layers, and no layer behind it makes good for the
    last (docs/profiling.md has the figures).
    """
    last = num_layers - 1
    return [*sorted(range(last), key=lambda layer: abs(layer - _CENTRE * last)), last]


def settle(config: MorphServeConfig, device: Device, levels_are_known: bool) -> Settled:
    """Write down the steps that the settings mean.

    Args:
        config: the settings.
        device: what the default follows.
        levels_are_known: a profile has levels, which count where no steps are listed; they are cut where they are read.
    """
    section, is_listed = config.ladder, isinstance(config.ladder.steps, list)
    if section.steps == "profile" or (levels_are_known and not is_listed and section.order in (None, "profile")):
        return Settled(config)
    if is_listed and config.quality.max_kl_per_token is None:
        return Settled(config)
    steps = section.steps if isinstance(section.steps, list) else _smaller(device)
    kept = _within(steps, section, max_kl(config), device.num_layers)
    note = _note(steps, kept, section, max_kl(config), device)
    ladder = section.model_copy(update={"steps": kept})
    return Settled(config.model_copy(update={"ladder": ladder}), note, not kept)


def _smaller(device: Device) -> list[LadderStep]:
    """Return a step for every format of the device that is smaller than the model's own weights."""
    formats = (fmt for fmt in device.formats if bits_of(fmt) < device.base_bits)
    return [LadderStep(format=fmt, layers_per_level=device.layers_per_level, optional=True) for fmt in formats]


def _is_trusted(fmt: str, section: LadderConfig) -> bool:
    return bits_of(fmt) >= _TRUSTED_BITS or fmt in section.expected_kl


def _within(steps: Sequence[LadderStep], section: LadderConfig, cap: float, num_layers: int) -> list[LadderStep]:
    """Return the steps, each with as many layers as keep the sum of what is known within the cap."""
    costs = [0.0] * num_layers  # of each place in the swap order; a layer carries its share of the all-layers figure
    kept = []
    for step in steps:
        wanted, cost = _num_layers(step, section, num_layers), section.expected_kl.get(step.format, 0.0)
        most = min(wanted, num_layers) if _is_trusted(step.format, section) else 0
        num = 0
        while num < most and (sum(costs) - costs[num] + cost) / num_layers <= cap * (1 + _TOLERANCE):
            costs[num] = cost
            num += 1
        if num:
            kept.append(step if num == min(wanted, num_layers) else step.model_copy(update={"layers": num}))
    return kept


def _num_layers(step: LadderStep, section: LadderConfig, num_layers: int) -> int:
    if step.layers != "all":
        return step.layers
    return len(section.order) if isinstance(section.order, list) else num_layers


def _note(
    steps: Sequence[LadderStep], kept: Sequence[LadderStep], section: LadderConfig, cap: float, device: Device
) -> str:
    """Say what is left out, why, and what to do about it; nothing where all of it is there."""
    layers = {step.format: step.layers for step in kept}
    unknown = [step.format for step in steps if not _is_trusted(step.format, section)]
    cut = [step.format for step in steps if _is_trusted(step.format, section) and step not in kept]
    parts = [] if kept else ["level 0 is the only level, so nothing will ever change"]
    if not kept and device.base_bits <= _TRUSTED_BITS:
        parts.append(f"the model's own weights have {device.base_bits} bits already")
    if cut:
        how = " and ".join(f"{fmt} on {layers.get(fmt, 0)} layers" for fmt in dict.fromkeys(cut))
        parts.append(f"{how} of {device.num_layers} is what quality.max_kl_per_token {cap:g} allows, raise it for more")
    if unknown:
        parts.append(
            f"the ladder has no {' and no '.join(dict.fromkeys(unknown))}: nobody has measured what that costs this "
            f"model. {_how_to_measure(unknown, device)}"
        )
    return "; ".join(parts)


def _how_to_measure(formats: Sequence[str], device: Device) -> str:
    if device.base_bits > _TRUSTED_BITS:
        return "`morphserve prepare MODEL` does; or give its figure as ladder.expected_kl"
    asked = " ".join(dict.fromkeys(formats))  # a profile is of 16 bits or more
    return f"`morphserve measure-kl MODEL --formats {asked}` does; give its figure as ladder.expected_kl"
