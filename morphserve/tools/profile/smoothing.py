"""Scales for W8 from calibration text (see quant_layers/sources/smoothing.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from morphserve.errors import ProfilingError
from morphserve.tools.profile.model import StreamedModel
from morphserve.tools.profile.variants import parts_of
from quant_layers import Scale, choose_scale, folds_of


@torch.no_grad()
def smooth_layer(
    model: StreamedModel, index: int, hidden: Tensor, arguments: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Scale]]:
    """Hidden states behind a layer, and the best scale for each linear whose input can be scaled.

    Args:
        hidden: in front of the layer, [num_windows, num_tokens, hidden_size].
        arguments: what else its forward takes, by window.

    Raises:
        ProfilingError: it has nothing that could be scaled.
    """
    linears, tensors = model.linears(index), model.layer(index)
    parts = parts_of(set(linears))
    folds = folds_of(set(parts) | {name for name, _ in model.layers[index].named_children()})
    if not folds:
        raise ProfilingError(
            f"{type(model.layers[index]).__name__} has no linear whose inputs could be scaled in what produces them; "
            f"its linears are {sorted(linears)}. Serve this model without a profile."
        )
    inputs: dict[str, list[Tensor]] = {fold.consumer: [] for fold in folds}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name].append(args[0].flatten(0, -2))

        return hook

    handles = [linears[parts[name][0]].register_forward_pre_hook(note(name)) for name in inputs]
    try:
        out = [model.run(index, tensors, hidden[w : w + 1], kwargs) for w, kwargs in enumerate(arguments)]
    finally:
        for handle in handles:
            handle.remove()
    scales = {
        name: choose_scale(torch.cat(rows), torch.cat([tensors[f"{part}.weight"] for part in parts[name]]))
        for name, rows in inputs.items()
    }
    return torch.cat(out), scales
