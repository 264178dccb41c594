"""A small decoder with paged attention, made of what the plugin is made of: slots, arenas, an elastic KV cache.

A decode step reads its tokens, positions and block table from tensors that stay where they are, so it can be captured;
which kernel a linear runs is decided when it is captured, by what its slot holds at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_resize import ArenaBacking, ElasticCache, KVGeometry, PagePool
from morphserve.tools.gpucheck.device import random_weight
from quant_layers import LinearSlot

LINEARS = ("qkv", "o", "gate_up", "down")


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
        """[N, K]."""
        width = self.heads * self.head_dim
        return {
            "qkv": (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, width),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }[name]

    @property
    def block_bytes(self) -> int:
        """K and V of one block in one layer, bf16."""
        return 2 * self.block_size * self.kv_heads * self.head_dim * 2


class BaseLinear:
    """Full precision, over a weight that lies in an arena."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return F.linear(x, self.weight)


class MiniModel:
    """Weights outside of the decoder layers, the KV cache, and the state of the sequences."""

    def __init__(
        self, shape: Shape, pool: PagePool, device: str, slots: dict[int, dict[str, LinearSlot]], max_blocks: int
    ) -> None:
        """
        Args:
            shape: of everything.
            pool: KV pages come from it.
            device: of all tensors.
            slots: by layer and linear.
            max_blocks: that the KV cache's addresses are laid out for; enough for all sequences are mapped.
        """
        self.shape, self._slots = shape, slots
        s = shape
        self._embedding = random_weight(s.vocab, s.hidden, device, seed=1) * s.hidden**0.5
        self._head = random_weight(s.vocab, s.hidden, device, seed=2)
        geometry = KVGeometry.layer_outermost(s.layers, s.block_bytes, max_blocks, pool.pager.granularity_bytes)
        self.base_blocks = s.batch * s.blocks_per_seq
        self.cache = ElasticCache(ArenaBacking(pool, geometry.size_bytes), geometry, self.base_blocks)
        # [layers, blocks, 2, block_size, kv_heads, head_dim]
        self._kv = self.cache.buffer.view(torch.bfloat16).view(
            s.layers, max_blocks, 2, s.block_size, s.kv_heads, s.head_dim
        )
        self.tokens = torch.zeros(s.batch, dtype=torch.int64, device=device)
        self._positions = torch.zeros(s.batch, dtype=torch.int64, device=device)
        self._table = torch.zeros(s.batch, s.blocks_per_seq, dtype=torch.int64, device=device)
        self._slots_of_keys = torch.arange(s.blocks_per_seq * s.block_size, device=device)
        self.hidden = torch.zeros(s.batch, s.hidden, dtype=torch.bfloat16, device=device)

    @property
    def max_steps(self) -> int:
        """Tokens that a sequence has room for."""
        return self.shape.blocks_per_seq * self.shape.block_size

    def reset(self, first_block: int = 0) -> None:
        """Begin all sequences anew, in blocks from `first_block` on, which must be mapped."""
        s = self.shape
        generator = torch.Generator().manual_seed(7)
        # A table in random order: blocks of a sequence never lie side by side on a server.
        order = torch.randperm(self.base_blocks, generator=generator).view(s.batch, s.blocks_per_seq) + first_block
        self._table.copy_(order)
        self.tokens.copy_(torch.randint(s.vocab, (s.batch,), generator=generator))
        self._positions.zero_()
        for layer in range(s.layers):
            self._kv[layer, first_block : first_block + self.base_blocks].zero_()

    def step(self, batch: int) -> None:
        """One token for each of the first `batch` sequences."""
        tokens, positions = self.tokens[:batch], self._positions[:batch]
        x = F.embedding(tokens, self._embedding)
        for layer in range(self.shape.layers):
            slots = self._slots[layer]
            x = x + slots["o"].impl(self._attend(layer, slots["qkv"].impl(_norm(x)), positions, batch))
            gate, up = slots["gate_up"].impl(_norm(x)).chunk(2, dim=-1)
            x = x + slots["down"].impl(F.silu(gate) * up)
        x = _norm(x)
        self.hidden[:batch].copy_(x)
        tokens.copy_(F.linear(x, self._head).argmax(dim=-1))
        positions.add_(1)

    def _attend(self, layer: int, qkv: Tensor, positions: Tensor, batch: int) -> Tensor:
        s = self.shape
        sizes = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
        q, k, v = torch.split(qkv, sizes, dim=-1)
        table = self._table[:batch]
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
        out = F.scaled_dot_product_attention(
            q.reshape(batch, s.heads, 1, s.head_dim),
            keys.repeat_interleave(groups, dim=1),
            values.repeat_interleave(groups, dim=1),
            attn_mask=mask,
        )
        return out.reshape(batch, s.heads * s.head_dim)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class LayerArena:
    """The tensors of one layer in one format, on pages of their own."""

    def __init__(self, pool: PagePool, like: dict[str, dict[str, Tensor]], device: str) -> None:
        """
        Args:
            pool: of pages.
            like: by linear and name: the shape, dtype and strides that each tensor is to have.
            device: where the pages are.
        """
        places: dict[tuple[str, str], int] = {}
        end = 0
        for linear, tensors in like.items():
            for name, tensor in tensors.items():
                places[linear, name] = end
                end += -(-tensor.nbytes // 256) * 256  # kernels want their tensors aligned
        self.num_bytes = end
        self._arena = ArenaBacking(pool, end)
        self.tensors: dict[str, dict[str, Tensor]] = {linear: {} for linear in like}
        for (linear, name), start in places.items():
            wanted = like[linear][name]
            assert wanted.is_contiguous(), f"{linear}.{name} has strides {wanted.stride()}"
            window = self._arena.buffer[start : start + wanted.nbytes]
            self.tensors[linear][name] = window.view(wanted.dtype).view(wanted.shape)
        page = self._arena.page_bytes
        self.num_pages = -(-end // page)
        self._pages = [(0, self.num_pages * page)]

    @property
    def bytes(self) -> Tensor:
        """uint8 [num_bytes]."""
        return self._arena.buffer.view(torch.uint8)

    def map(self) -> None:
        """Take pages from the pool; what they hold is not defined, except that it is finite."""
        self._arena.populate(self._pages)

    def unmap(self) -> None:
        """Give them back, once the work that may read them is done."""
        self._arena.release(self._pages)

    def lay_out(self, tensors: dict[str, dict[str, Tensor]], into: Tensor) -> None:
        """Write tensors into `into`, uint8 [num_bytes] on the host, as they are to lie here."""
        start = 0
        for linear, row in self.tensors.items():
            for name in row:
                raw = tensors[linear][name].contiguous().flatten().view(torch.uint8)
                into[start : start + raw.numel()].copy_(raw)
                start += -(-raw.numel() // 256) * 256
