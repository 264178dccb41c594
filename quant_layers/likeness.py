"""What half a layer computes in a new format, held against what serves: garbage is found before it does.

Digests say that bytes are those that were made. They do not say that a kernel, a checkpoint or a fold made sense of
them: only an answer does. A few random rows are enough, since a fault of this kind leaves nothing alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_layers.errors import KernelError
from quant_layers.formats.halves import BASE
from quant_layers.kernels.cpu_linears import LinearImpl
from quant_layers.sources.smoothing import folds_of

LEAST_COSINE = 0.8  # 4 bits give 0.97 and more through two linears; weights of another layer 0.1
_ROWS = 4
_GATE_UP, _QKV = "mlp.gate_up_proj", "self_attn.qkv_proj"
_CHAINS = {_GATE_UP: "mlp.down_proj", _QKV: "self_attn.o_proj"}
Look = Callable[[int, str, "HalfLayer", "HalfLayer"], None]  # (layer, format, new, what serves); may refuse


@dataclass(frozen=True, slots=True)
class HalfLayer:
    """Half a layer as it is called.

    Attributes:
        linears: by name inside the layer.
        norms: by name, the weights that are in force with these linears.
    """

    linears: Mapping[str, LinearImpl]
    norms: Mapping[str, Tensor]


@dataclass(slots=True)
class FirstLook:
    """Looks at the first half of each kind that comes in each format. `Look`.

    Attributes:
        widths: linear's name |-> input channels on this rank.
        dtype: of activations.
        norm_offset: what the model's norms add to their weights: 1 for Gemma's.
        remedy: the end of the message.
    """

    widths: Mapping[str, int]
    dtype: torch.dtype
    norm_offset: float
    remedy: str
    _seen: set[tuple[str, frozenset[str]]] = field(default_factory=set)

    def __call__(self, layer: int, fmt: str, new: HalfLayer, old: HalfLayer) -> None:
        """Compare, where nothing like it was compared before.

        Raises:
            KernelError: the answers have little in common.
        """
        kind = fmt, frozenset(new.linears)
        if fmt == BASE or kind in self._seen:  # the base is what was loaded, byte by byte, and never the one at fault
            return
        with torch.inference_mode():
            pairs = zip(self._answers(new), self._answers(old), strict=True)
            # What serves may itself overflow on rows that no text makes: that is no fault of the new format.
            cosines = [_cosine(mine, theirs) for mine, theirs in pairs if theirs.any() and theirs.isfinite().all()]
        for cosine in cosines:
            if not cosine >= LEAST_COSINE:  # nor NaN
                raise KernelError(
                    f"layer {layer}: {', '.join(sorted(new.linears))} in {fmt} compute something else than what serves "
                    f"(cosine {cosine:.2f}, at least {LEAST_COSINE}); {self.remedy}"
                )
        self._seen.add(kind)

    def again(self) -> None:
        """Look at every format once more."""
        self._seen.clear()

    def _answers(self, half: HalfLayer) -> Iterator[Tensor]:
        """Yield what the linears give for the same rows, those that feed each other one behind the other.

        A fold may scale what lies between two linears, or behind a norm: no difference by itself.
        """
        generator = torch.Generator().manual_seed(0)
        rows = {name: torch.randn(_ROWS, k, generator=generator) for name, k in sorted(self.widths.items())}
        norms = {fold.consumer: fold.producer for fold in folds_of({*half.linears, *half.norms}) if fold.how == "norm"}
        behind = {head: tail for head, tail in _CHAINS.items() if {head, tail} <= half.linears.keys()}
        for name in sorted(half.linears.keys() - set(behind.values())):
            norm = half.norms.get(norms.get(name, ""))
            x = rows[name] if norm is None else rows[name] * (norm.float() + self.norm_offset)
            y = half.linears[name](x.to(self.dtype)).float()
            if (tail := behind.get(name)) is None:
                yield y
                continue
            seen, between = _split(name, y, self.widths[tail])
            if seen is not None:
                yield seen
            yield half.linears[tail]((rows[tail] if between is None else between).to(self.dtype)).float()


def _split(name: str, y: Tensor, num_inputs: int) -> tuple[Tensor | None, Tensor | None]:
    """Return which of a linear's outputs are comparable, and what the others give to the linear behind it.

    Where the widths say that it is not so (None), all are, and that linear gets rows of its own.
    """
    num_outputs = y.shape[1]
    if name == _GATE_UP and num_outputs == 2 * num_inputs:
        gate, up = y.chunk(2, dim=1)
        return None, torch.nn.functional.silu(gate) * up
    num_values = (num_outputs - num_inputs) // 2  # a lone token's attention is its value, for each head of a group
    if name == _QKV and num_values > 0 and not num_inputs % num_values and not (num_outputs - num_inputs) % 2:
        return y[:, :-num_values], y[:, -num_values:].repeat(1, num_inputs // num_values)
    return y, None


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
