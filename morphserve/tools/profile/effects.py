"""What swapping a layer does to the model's answer, for every layer and format, in two passes over the weights.

To second order, the KL divergence that a small change d of hidden states causes is d' F d / 2, with F the Fisher
information of the answer: the mean of g g' over answers drawn from the model, g being the gradient of their log
probability. So one backward pass prices the changes of all layers and formats at once, and changes in several
layers add up inside the square, which gives what any set of them costs without another pass. Tokens are taken one
by one (the changes of different tokens point in unrelated directions).

What serves is no fp32 model: behind the first swapped layer every rounding to bf16 falls differently than it did, which
costs some KL of its own.

A layer costs the same however many others there are: its forward, its backward and one forward per format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from morphserve.tools.profile.model import LayerTensors, StreamedModel
from morphserve.tools.profile.smoothing import smooth_layer
from morphserve.tools.profile.variants import RoundToNearest
from morphserve.tools.profile.workspace import Workspace
from quant_layers import Change, QuadraticCost, Scale

Key = tuple[str, str]  # half (empty = the whole layer), format


@dataclass(frozen=True, slots=True)
class LayerEffects:
    """One layer's part, by what is changed and into what format."""

    slopes: dict[Key, Tensor]  # g . d of each token: fp32 [num_windows * num_draws * num_tokens]
    transformation: float  # mean cosine of its output with its input: LTS (paper, Algorithm 1)
    replacement: dict[Key, float]  # mean cosine of its output with the exact one: LRS
    rounding: float  # KL between two runs that round its arithmetic to the model's dtype independently


torch.serialization.add_safe_globals([LayerEffects, Scale])  # what a workspace holds beside tensors: values alone


def forward_sweep(
    model: StreamedModel, windows: Tensor, workspace: Workspace, on_layer: Callable[[int], Any] = lambda _: None
) -> list[list[dict[str, Any]]]:
    """Hidden states in front of every layer and input scales for W8, into the workspace.

    Args:
        windows: token ids [num_windows, num_tokens].

    Returns:
        What else a layer's forward takes, by layer and window.
    """
    hidden, arguments = model.begin(windows)
    workspace.save("hidden", 0, torch.cat(hidden))
    for index in range(len(model)):
        if not (workspace.has("hidden", index + 1) and workspace.has("scales", index)):
            states = workspace.load("hidden", index)
            out, scales = smooth_layer(model, index, states, arguments[index])
            workspace.save("scales", index, scales)
            workspace.save("hidden", index + 1, out)
        on_layer(index)
    return arguments


def backward_sweep(
    model: StreamedModel,
    variants: Sequence[RoundToNearest],
    arguments: Sequence[Sequence[dict[str, Any]]],
    workspace: Workspace,
    num_draws: int,
    seed: int,
    on_layer: Callable[[int], Any] = lambda _: None,
) -> list[LayerEffects]:
    """Effects of every layer, from the last to the first. Goes on where an earlier run of the workspace ended."""
    depth = len(model)
    if not workspace.has("gradient", depth):
        states = workspace.load("hidden", depth)
        workspace.save("gradient", depth, _gradients_of_answers(model, states, num_draws, seed))
    found: list[LayerEffects] = []
    for index in reversed(range(depth)):
        if not (workspace.has("gradient", index) and workspace.has("effects", index)):
            effects, before = _one_layer(
                model, index, variants, workspace.load("hidden", index), workspace.load("gradient", index + 1),
                arguments[index],
            )  # fmt: skip
            workspace.save("effects", index, effects)
            workspace.save("gradient", index, before)
            workspace.drop("gradient", index + 1)
        found.append(workspace.load("effects", index))
        on_layer(index)
    return found[::-1]


def cost_of(effects: Sequence[LayerEffects]) -> QuadraticCost:
    """Price of every change that was looked at."""
    return QuadraticCost.of_slopes(
        {Change(i, fmt, half): row for i, e in enumerate(effects) for (half, fmt), row in e.slopes.items()},
        [e.rounding for e in effects],
    )


def _gradients_of_answers(model: StreamedModel, hidden: Tensor, num_draws: int, seed: int) -> Tensor:
    """Gradients of the log probability of drawn next tokens: [num_windows, num_draws, num_tokens, hidden_size]."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for states in hidden.split(1):
        states = states.requires_grad_()
        logs = model.logits(states).log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), num_draws, replacement=True, generator=generator)
        sums = [logs.gather(1, drawn[:, i : i + 1]).sum() for i in range(num_draws)]
        rows.append(torch.cat([torch.autograd.grad(s, states, retain_graph=True)[0] for s in sums]))
    return torch.stack(rows)


def _one_layer(
    model: StreamedModel,
    index: int,
    variants: Sequence[RoundToNearest],
    hidden: Tensor,
    gradient: Tensor,
    arguments: Sequence[dict[str, Any]],
) -> tuple[LayerEffects, Tensor]:
    """Return the layer's effects, and the gradient in front of it."""
    tensors: LayerTensors = model.layer(index)
    served_in = next(iter(tensors.values())).dtype
    keys = [(variant.half, variant.format) for variant in variants]
    slopes: dict[Key, list[Tensor]] = {key: [] for key in keys}
    replacement: dict[Key, list[Tensor]] = {key: [] for key in keys}
    transformation, before, rounding = [], [], []
    for window, kwargs in enumerate(arguments):
        states = hidden[window : window + 1].requires_grad_()
        exact = model.run(index, tensors, states, kwargs)
        before.append(
            torch.cat([torch.autograd.grad(exact, states, g[None], retain_graph=True)[0] for g in gradient[window]])
        )
        with torch.no_grad():
            transformation.append(torch.cosine_similarity(exact, states, dim=-1).mean())
            rounded = model.run(index, tensors, states, kwargs, served_in)
            rounding.append((gradient[window] * (rounded - exact)).sum(-1).square().mean())  # half of it, two runs
            for key, variant in zip(keys, variants, strict=True):
                out = variant.run(model, index, tensors, states, kwargs)
                slopes[key].append((gradient[window] * (out - exact)).sum(-1).flatten())
                replacement[key].append(torch.cosine_similarity(out, exact, dim=-1).mean())
    effects = LayerEffects(
        {key: torch.cat(parts) for key, parts in slopes.items()},
        float(torch.stack(transformation).mean()),
        {key: float(torch.stack(parts).mean()) for key, parts in replacement.items()},
        float(torch.stack(rounding).mean()),
    )
    return effects, torch.stack(before).detach()
