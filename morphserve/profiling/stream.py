"""Calibration text through a model, one decoder layer at a time.

Only the hidden states of all windows and one layer's inputs are kept, so memory does not grow with depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from morphserve.errors import ProfilingError


class _Reached(Exception):
    """The first decoder layer was called: its inputs are known, the rest of the pass is not needed."""


@dataclass(slots=True)
class Calibration:
    """Hidden states of all windows before some layer, and what else a layer's forward takes."""

    hidden: list[Tensor]  # one [1, num_tokens, hidden_size] a window
    arguments: list[dict[str, Any]]

    @classmethod
    @torch.no_grad()
    def begin(cls, model: nn.Module, windows: Tensor) -> Calibration:
        """Before the first layer.

        Args:
            model: a transformers causal language model.
            windows: token ids [num_windows, num_tokens].
        """
        first = decoder_layers(model)[0]
        hidden: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.append(kwargs)
            raise _Reached

        handle = first.register_forward_pre_hook(note, with_kwargs=True)
        try:
            for window in windows:
                with contextlib.suppress(_Reached):
                    model(window[None], use_cache=False)
        finally:
            handle.remove()
        return cls(hidden, arguments)

    @torch.no_grad()
    def pass_through(self, layer: nn.Module, watched: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Move on behind `layer`; inputs [num_tokens of all windows, K] of the linears in `watched`."""
        inputs: dict[str, list[Tensor]] = {name: [] for name in watched}

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                inputs[name].append(args[0].flatten(0, -2))

            return hook

        handles = [linear.register_forward_pre_hook(note(name)) for name, linear in watched.items()]
        try:
            for i, kwargs in enumerate(self.arguments):
                out = layer(self.hidden[i], **kwargs)
                self.hidden[i] = out[0] if isinstance(out, tuple) else out
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.cat(parts) for name, parts in inputs.items()}


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model.

    Raises:
        ProfilingError: it has none where dense decoders have them.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ProfilingError(
            f"{type(model).__name__} has no decoder layers under 'model.layers'. Profile a dense decoder-only model."
        )
    return layers


def norms_of(layers: nn.ModuleList) -> Iterator[tuple[str, Tensor]]:
    """Norm weights, by the name below the list of layers, as vLLM names them too."""
    for name, parameter in layers.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            yield name, parameter


def token_windows(tokenizer: Any, files: list[Path], num_windows: int, length: int) -> Tensor:
    """`num_windows` windows of `length` tokens, spread evenly over each file: [all windows, length].

    Raises:
        ProfilingError: a file is too short.
    """
    rows: list[list[int]] = []
    for file in files:
        ids = tokenizer.encode(file.read_text(encoding="utf-8"))
        if len(ids) < num_windows * length:
            raise ProfilingError(
                f"{file} has {len(ids):,} tokens, {num_windows} windows of {length} need {num_windows * length:,}. "
                "Give a longer text, or lower --windows."
            )
        stride = len(ids) // num_windows
        rows += [ids[i * stride : i * stride + length] for i in range(num_windows)]
    return torch.tensor(rows)
