"""A small decoder with paged attention, cut into pieces where vLLM cuts: between two attentions.

A decode step reads its tokens, positions and block table from tensors that stay where they are, so it can be captured;
its linears are found by the addresses of their weights, as those of a compiled model are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kv_resize import ElasticCache
from morphserve.tools.gpucheck.device import random_weight
from morphserve.tools.gpucheck.mini.pieces import Outputs, Piece

LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")  # inside a layer


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model and its KV cache. By default a Llama-8B, of fewer layers and words."""

    layers: int = 16
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    inner: int = 14336
    vocab: int = 8192
    block_size: int = 16  # tokens
    blocks_per_seq: int = 32
    batch: int = 16

    def linear(self, name: str) -> tuple[int, int]:
        """Return the weight [N, K]."""
        width = self.heads * self.head_dim
        return {
            "self_attn.qkv_proj": (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            "self_attn.o_proj": (self.hidden, width),
            "mlp.gate_up_proj": (2 * self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }[name]

    @property
    def block_bytes(self) -> int:
        """K and V of one block in one layer, bf16."""
        return 2 * self.block_size * self.kv_heads * self.head_dim * 2

    @property
    def num_blocks(self) -> int:
        """Those of all sequences."""
        return self.batch * self.blocks_per_seq


SMALL = Shape(4, 64, 4, 2, 16, 96, 64, block_size=4, blocks_per_seq=4, batch=4)  # for dry runs


class BaseLinear:
    """Full precision, over a weight that stays where it lies."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply: [..., K] -> [..., N]."""
        return F.linear(x, self.weight)


class MiniModel:
    """Weights outside of the decoder layers, the state of the sequences, and the pieces of a step."""

    def __init__(
        self, shape: Shape, weights: Sequence[Mapping[str, Tensor]], cache: ElasticCache, device: str, pool: object
    ) -> None:
        """
        Args:
            shape: of everything.
            weights: by layer and name inside it; `linear_of` knows their addresses.
            cache: of KV blocks, of which those of all sequences are mapped.
            device: of all tensors.
            pool: that graphs of pieces take their memory from.
        """
        self.shape, self._weights = shape, weights
        s = shape
        self._embedding = random_weight(s.vocab, s.hidden, device, seed=1) * s.hidden**0.5
        self._head = random_weight(s.vocab, s.hidden, device, seed=2)
        # [layers, blocks, 2, block_size, kv_heads, head_dim]
        self._kv = cache.buffer.view(torch.bfloat16).view(
            s.layers, cache.max_num_blocks, 2, s.block_size, s.kv_heads, s.head_dim
        )
        self.tokens = torch.zeros(s.batch, dtype=torch.int64, device=device)
        self._positions = torch.zeros(s.batch, dtype=torch.int64, device=device)
        self._table = torch.zeros(s.batch, s.blocks_per_seq, dtype=torch.int64, device=device)
        self._slots_of_keys = torch.arange(s.blocks_per_seq * s.block_size, device=device)
        self._attended = torch.zeros(s.batch, s.heads * s.head_dim, dtype=torch.bfloat16, device=device)
        self.hidden = torch.zeros(s.batch, s.hidden, dtype=torch.bfloat16, device=device)
        self.pieces = [Piece(self._runnable(number), device, pool) for number in range(s.layers + 1)]

    @property
    def max_steps(self) -> int:
        """Tokens that a sequence has room for."""
        return self.shape.blocks_per_seq * self.shape.block_size

    def reset(self, first_block: int = 0) -> None:
        """Begin all sequences anew, in blocks from `first_block` on, which must be mapped."""
        s = self.shape
        generator = torch.Generator().manual_seed(7)
        # A table in random order: blocks of a sequence never lie side by side on a server.
        order = torch.randperm(s.num_blocks, generator=generator).view(s.batch, s.blocks_per_seq) + first_block
        self._table.copy_(order)
        self.tokens.copy_(torch.randint(s.vocab, (s.batch,), generator=generator))
        self._positions.zero_()
        for layer in range(s.layers):
            self._kv[layer, first_block : first_block + s.num_blocks].zero_()

    def step(self, batch: int) -> None:
        """Make one token for each of the first `batch` sequences."""
        qkv, x = self.pieces[0](self.tokens[:batch])
        for layer, piece in enumerate(self.pieces[1:-1]):
            qkv, x = piece(self._attend(layer, qkv), x)
        (x,) = self.pieces[-1](self._attend(self.shape.layers - 1, qkv), x)
        self.hidden[:batch].copy_(x)
        self.tokens[:batch].copy_(F.linear(x, self._head).argmax(dim=-1))
        self._positions[:batch].add_(1)

    def _runnable(self, number: int) -> Callable[..., Outputs]:
        """Make the piece between two attentions: the end of layer `number - 1` and the beginning of `number`."""

        def run(*args: Tensor) -> Outputs:
            if number == 0:
                x = F.embedding(args[0], self._embedding)
            else:
                attended, x = args
                x = x + self._linear(number - 1, "self_attn.o_proj", attended)
                gate, up = self._linear(number - 1, "mlp.gate_up_proj", _norm(x)).chunk(2, dim=-1)
                x = x + self._linear(number - 1, "mlp.down_proj", F.silu(gate) * up)
            if number == self.shape.layers:
                return (_norm(x),)
            return self._linear(number, "self_attn.qkv_proj", _norm(x)), x

        return run

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.morphserve.linear_of(x, self._weights[layer][name])
        return y

    def _attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Return [batch, heads * head_dim], at the same address in every step: graphs of pieces read it."""
        s, batch = self.shape, len(qkv)
        sizes = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
        q, k, v = torch.split(qkv, sizes, dim=-1)
        table, positions = self._table[:batch], self._positions[:batch]
        block = table.gather(1, (positions // s.block_size)[:, None])[:, 0]
        cache = self._kv[layer]
        place = (block, positions % s.block_size)
        cache[:, 0].index_put_(place, k.reshape(batch, s.kv_heads, s.head_dim))
        cache[:, 1].index_put_(place, v.reshape(batch, s.kv_heads, s.head_dim))
        # [batch, blocks_per_seq, 2, block_size, kv_heads, head_dim]: only blocks of the table are read, all are mapped.
        held = cache.index_select(0, table.flatten()).view(batch, -1, 2, s.block_size, s.kv_heads, s.head_dim)
        keys, values = (
            held[:, :, which].reshape(batch, -1, s.kv_heads, s.head_dim).transpose(1, 2) for which in (0, 1)
        )
        mask = (self._slots_of_keys[None, :] <= positions[:, None])[:, None, None, :]
        groups = s.heads // s.kv_heads
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # cuDNN's differs from run to run
            out = F.scaled_dot_product_attention(
                q.reshape(batch, s.heads, 1, s.head_dim),
                keys.repeat_interleave(groups, dim=1),
                values.repeat_interleave(groups, dim=1),
                attn_mask=mask,
            )
        return self._attended[:batch].copy_(out.reshape(batch, s.heads * s.head_dim))


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))
