"""The paper's own swap order (Algorithm 1), for comparison: it prices a layer by passes of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from morphserve.tools.profile.model import LayerTensors, StreamedModel
from morphserve.tools.profile.variants import RoundToNearest
from quant_layers import layer_importance_order


class _Passes:
    """Hidden states of the model with some layers quantized; a candidate costs the layers behind it."""

    def __init__(self, model: StreamedModel, windows: Tensor, format: str) -> None:
        self._model = model
        hidden, self._arguments = model.begin(windows)
        self._tensors: list[LayerTensors] = [model.layer(index) for index in range(len(model))]
        self._variants = [RoundToNearest(format) for _ in range(len(model))]  # each keeps its own layer's weights
        self._states: list[list[Tensor]] = [[states] for states in hidden]
        self._logits: list[Tensor] = []
        self._taken: tuple[int, ...] = ()
        self._refresh(0)

    @torch.no_grad()
    def degradation(self, taken: tuple[int, ...], candidate: int) -> float:
        """MDS of one more layer: mean cosine of the logits with and without it quantized."""
        if taken != self._taken:
            first = min(set(taken) - set(self._taken))
            self._taken = taken
            self._refresh(first)
        scores = []
        for window, logits in enumerate(self._logits):
            states = self._run(candidate, window, self._states[window][candidate], quantized=True)
            for index in range(candidate + 1, len(self._model)):
                states = self._run(index, window, states, quantized=index in taken)
            scores.append(torch.cosine_similarity(logits, self._model.logits(states), dim=-1).mean())
        return float(torch.stack(scores).mean())

    @torch.no_grad()
    def layer_scores(self, index: int) -> tuple[float, float]:
        """LTS and LRS, of a layer in the unquantized model. Ask before `degradation`."""
        lts, lrs = [], []
        for window, states in enumerate(self._states):
            out = self._run(index, window, states[index], quantized=True)
            lts.append(torch.cosine_similarity(states[index + 1], states[index], dim=-1).mean())
            lrs.append(torch.cosine_similarity(states[index + 1], out, dim=-1).mean())
        return float(torch.stack(lts).mean()), float(torch.stack(lrs).mean())

    def _run(self, index: int, window: int, states: Tensor, *, quantized: bool) -> Tensor:
        kwargs: Mapping[str, Any] = self._arguments[index][window]
        if quantized:
            return self._variants[index].run(self._model, index, self._tensors[index], states, kwargs)
        return self._model.run(index, self._tensors[index], states, kwargs)

    @torch.no_grad()
    def _refresh(self, first: int) -> None:
        """States behind layer `first` and further, and the logits."""
        self._logits = []
        for window, states in enumerate(self._states):
            del states[first + 1 :]
            for index in range(first, len(self._model)):
                states.append(self._run(index, window, states[-1], quantized=index in self._taken))
            self._logits.append(self._model.logits(states[-1]))


def lis_order(model: StreamedModel, windows: Tensor, format: str) -> list[int]:
    """Layer ids, safest first, by LIS with the paper's weights. About L^2 / 4 passes; all weights stay in memory.

    Args:
        windows: token ids [num_windows, num_tokens].
        format: that layers are swapped into.
    """
    passes = _Passes(model, windows, format)
    lts, lrs = zip(*(passes.layer_scores(index) for index in range(len(model))), strict=True)
    return layer_importance_order(lts, lrs, passes.degradation)
