"""From a model and a text to a profile."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from morphserve.errors import ProfilingError
from morphserve.hub import find_files
from morphserve.prepared import moment, weights_fingerprint
from morphserve.tools.apart import Progress
from morphserve.tools.profile.effects import LayerEffects, backward_sweep, cost_of, forward_sweep
from morphserve.tools.profile.measure import measure_apart
from morphserve.tools.profile.model import StreamedModel
from morphserve.tools.profile.text import load_tokenizer, token_windows
from morphserve.tools.profile.variants import RoundToNearest
from morphserve.tools.profile.workspace import Workspace
from morphserve.version import __version__
from quant_layers import (
    BASE,
    FORMATS,
    HALVES,
    Change,
    Move,
    Profile,
    ProfileError,
    ProfileLevel,
    QuadraticCost,
    Scale,
    Unit,
    base_fingerprint,
    greedy,
    half_of,
    join_format,
    read_profile,
    split_format,
    write_profile,
)

_BETWEEN = 0.5  # of a window's share of the text: where profiling did not look


@dataclass(frozen=True, slots=True)
class ProfileJob:
    """What one profile is made from. Two runs with equal jobs make the same profile."""

    model: str  # directory or hub name
    text: tuple[Path, ...]
    out: Path
    formats: tuple[str, ...]
    windows: int  # per text
    length: int  # tokens of a window
    draws: int  # answers drawn per token
    moves_per_level: int
    seed: int
    halves: bool = False  # attention and MLP one by one
    sources: tuple[tuple[str, str], ...] = ()  # (format, how its checkpoint was made): what levels are measured with


def run_profile(
    job: ProfileJob,
    measure: Sequence[str] | None,
    eval_text: Sequence[Path],
    progress: Progress = lambda *_: None,
) -> tuple[Profile, float]:
    """Profile the model into `job.out`.

    Args:
        job: what to do.
        measure: further arguments of `morphserve measure-kl`; None to leave measuring out.
        eval_text: what levels are measured on; empty = other windows of the calibration text.
        progress: hears how far it is.

    Returns:
        The profile, and the seconds it took (of this run, where an earlier one was taken over).

    Raises:
        ProfilingError, ProfileError: bad input, no room, or the model cannot be measured.
    """
    start = time.perf_counter()
    if job.out.exists():
        raise ProfileError(f"{job.out} exists; give another --out, or delete it")
    directory = find_files(job.model, "model")
    windows = token_windows(load_tokenizer(directory), job.text, job.windows, job.length)
    model = StreamedModel(directory)
    fingerprint = base_fingerprint(dict(model.norms()))
    settings = {key: str(value) for key, value in asdict(job).items()} | {"fingerprint": fingerprint}
    workspace = Workspace(job.out.with_name(f"{job.out.name}.unfinished"), settings)
    effects, scales = price_layers(job, model, windows, workspace, progress)
    cost = cost_of(effects)
    sizes = estimated_bytes(model, (BASE, *job.formats))
    moves = greedy(cost, lambda unit, fmt: sizes[fmt][unit])
    ladder = _levels(moves, job.moves_per_level)
    order = swap_order(moves, len(model))
    made = _provenance(job, directory)
    figures = _figures(effects, scales, cost) | {"priced_kl": [level.expected_kl for level in ladder]}
    values = _values(scales)
    if measure is not None:
        with tempfile.TemporaryDirectory(dir=workspace.directory) as scratch:
            predicted = Path(scratch) / "predicted"
            write_profile(predicted, fingerprint, values, ladder, order, made, figures)
            ladder, how = _measured(job, predicted, ladder, measure, eval_text, progress)
            made |= how
    seconds = round(time.perf_counter() - start, 1)
    write_profile(job.out, fingerprint, values, ladder, order, made, figures | {"seconds": seconds})
    workspace.remove()
    return read_profile(job.out), seconds


def swap_order(moves: Sequence[Move], num_layers: int) -> tuple[int, ...]:
    """Layers as they are first touched; any that no move touches come last."""
    touched = dict.fromkeys(move.change.layer for move in moves)
    return (*touched, *(layer for layer in range(num_layers) if layer not in touched))


def estimated_bytes(model: StreamedModel, formats: Sequence[str]) -> dict[str, dict[Unit, int]]:
    """Bytes of the linears of each layer and half by format, as CPU kernels lay them out; serving uses its own."""
    found: dict[str, dict[Unit, int]] = {fmt: {} for fmt in formats}
    for index in range(len(model)):
        for name, linear in model.linears(index).items():
            for fmt, sizes in found.items():
                n, k = linear.weight.shape
                size = 2 * n * k if fmt == BASE else FORMATS[fmt].packed_bytes(n, k)
                for unit in ((index, ""), (index, half_of(name))):
                    sizes[unit] = sizes.get(unit, 0) + size
    return found


def price_layers(
    job: ProfileJob, model: StreamedModel, windows: torch.Tensor, workspace: Workspace,
    progress: Progress = lambda *_: None,
) -> tuple[list[LayerEffects], list[dict[str, Scale]]]:  # fmt: skip
    """Run both sweeps over the layers: what each format does to the answer, and the input scales for W8.

    Args:
        job: uses `formats`, `halves`, `draws` and `seed`.
        model: whose layers are priced.
        windows: token ids [num_windows, num_tokens].
        workspace: where a run that was killed goes on.
        progress: hears how far it is.
    """
    depth = len(model)
    arguments = forward_sweep(model, windows, workspace, lambda i: progress("input scales", i + 1, depth))
    scales: list[dict[str, Scale]] = [workspace.load("scales", index) for index in range(depth)]
    values = _values(scales)
    variants = [RoundToNearest(fmt, values, half) for half in (HALVES if job.halves else ("",)) for fmt in job.formats]
    effects = backward_sweep(
        model, variants, arguments, workspace, job.draws, job.seed,
        lambda i: progress("effects of layers", depth - i, depth),
    )  # fmt: skip
    return effects, scales


def _values(scales: Sequence[Mapping[str, Scale]]) -> dict[int, dict[str, torch.Tensor]]:
    return {layer: {name: scale.values for name, scale in row.items()} for layer, row in enumerate(scales)}


def _levels(moves: Sequence[Move], per_level: int) -> list[ProfileLevel]:
    """Level 0, then one level every `per_level` moves; the last move ends the last level."""
    ladder = [ProfileLevel({}, 0.0, 0.0, 0, 1.0)]
    layers: dict[int, str] = {}
    for number, move in enumerate(moves, start=1):
        layers[move.change.layer] = _changed(layers.get(move.change.layer, BASE), move.change)
        if number % per_level == 0 or number == len(moves):
            ladder.append(ProfileLevel(dict(layers), move.expected_kl, None, move.bytes_freed))
    return ladder


def _changed(format: str, change: Change) -> str:
    """Return a layer's format after a change of it or of half of it."""
    attention, mlp = split_format(format)
    return {
        "": change.format,
        "attention": join_format(change.format, mlp),
        "mlp": join_format(attention, change.format),
    }[change.half]


def _measured(
    job: ProfileJob, predicted: Path, ladder: Sequence[ProfileLevel], arguments: Sequence[str], texts: Sequence[Path],
    progress: Progress,
) -> tuple[list[ProfileLevel], dict[str, Any]]:  # fmt: skip
    """Return the ladder with what its levels cost where they are served, and in what that was measured.

    What is expected of a level is then its KL on the calibration text, in windows between those that chose the scales
    (these would flatter it) and twice as many (one window's KL varies by 10 to 20 %): the prices that made the ladder
    are of second order, and 15 to 41 % low on SmolLM2-135M.
    """
    offset = () if texts else ("--offset", _BETWEEN)
    try:
        document = measure_apart(
            job.model, [level.layers for level in ladder[1:]], "--profile", predicted, "--timed",
            "--windows", job.windows, "--length", job.length, *arguments, "--text", *(texts or job.text), *offset,
            "--predict-text", *job.text, "--predict-windows", 2 * job.windows, "--predict-offset", _BETWEEN,
            progress=progress,
        )  # fmt: skip
    except ProfilingError as error:
        raise ProfilingError(f"{error} Start again with --no-measure to keep the prediction alone.") from error
    sizes = document["layer_bytes"]
    found = [ladder[0]]
    for level, row in zip(ladder[1:], document["rows"], strict=True):
        freed = sum(sizes[BASE][layer] - sizes[fmt][layer] for layer, fmt in level.layers.items())
        found.append(ProfileLevel(level.layers, row["kl_predicted"], row["kl"], freed, row["step_time_factor"]))
    return found, {key: document[key] for key in ("dtype", "tier", "kernels", "int8_activations")}


def _provenance(job: ProfileJob, directory: Path) -> dict[str, Any]:
    return {
        "model": directory.name,
        "weights": weights_fingerprint(directory),
        "formats": list(job.formats),
        "sources": dict(job.sources),
        "when": moment(),
        "morphserve": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "text": [file.name for file in job.text],
        "windows": job.windows,
        "length": job.length,
        "draws": job.draws,
        "seed": job.seed,
    }


def _figures(
    effects: Sequence[LayerEffects], scales: Sequence[dict[str, Scale]], cost: QuadraticCost
) -> dict[str, Any]:
    """Return what is not needed for serving, but for understanding the ladder."""
    layers = {
        str(layer): {
            "kl": {_label(half, fmt): cost.kl([Change(layer, fmt, half)]) for half, fmt in e.slopes},
            "lts": e.transformation,
            "lrs": {_label(half, fmt): lrs for (half, fmt), lrs in e.replacement.items()},
            "smoothing": {
                name: {"exponent": s.exponent, "error": s.error, "error_plain": s.error_plain}
                for name, s in row.items()
            },
        }
        for layer, (e, row) in enumerate(zip(effects, scales, strict=True))
    }
    return {"layers": layers}


def _label(half: str, format: str) -> str:
    return f"{half} {format}".strip()
