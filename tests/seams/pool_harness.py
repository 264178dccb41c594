"""vLLM's real KVCacheManager with the few scheduler attributes the pool needs, and a model of the KV.

`KVModel` stands for the workers' memory: what each slot of each block holds, as the tokens it was
computed from. Whoever reads a wrong block, or a stale one, sees other tokens than its own.
"""

from __future__ import annotations

from collections import Counter
from math import isclose
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from morphserve.integration.engine.block_pool import VllmBlockPool
from morphserve.integration.engine.provenance import PrefixReuse, Provenance

BLOCK = 4  # tokens per block
MAX_MODEL_LEN = 24
MAX_BLOCKS = 40
WATERMARK = 0.1
FLOOR = 7  # blocks: one request of 24 tokens and the null block

init_none_hash(sha256)
_HASHER = get_request_block_hasher(BLOCK, sha256)


def full_attention(**changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **({"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32} | changes)
    )


def kv_config(*specs: Any, num_blocks: int = MAX_BLOCKS) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def vllm_config(**changes: Any) -> SimpleNamespace:
    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    model = SimpleNamespace(max_model_len=MAX_MODEL_LEN)
    fields = {"kv_transfer_config": None, "parallel_config": parallel, "model_config": model}
    return SimpleNamespace(**(fields | changes))


def make_scheduler(**manager_options: Any) -> SimpleNamespace:
    """A scheduler as far as `VllmBlockPool` and `Provenance` look at it."""
    config = kv_config(full_attention())
    options = {"enable_caching": True, "watermark": WATERMARK} | manager_options
    manager = KVCacheManager(
        config,
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        **options,
    )
    return SimpleNamespace(
        vllm_config=vllm_config(),
        kv_cache_config=config,
        kv_cache_manager=manager,
        cache_config=SimpleNamespace(num_gpu_blocks=MAX_BLOCKS),
        scheduler_config=SimpleNamespace(watermark=WATERMARK),
    )


def make_request(request_id: str, tokens: list[int]) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(max_tokens=MAX_MODEL_LEN),
        pooling_params=None,
        block_hasher=_HASHER,
    )


class KVModel:
    """A tiny engine: allocates through vLLM, writes and reads modelled KV, obeys copies."""

    def __init__(self, rule: PrefixReuse = "not_worse", **manager_options: Any) -> None:
        self.scheduler = make_scheduler(**manager_options)
        self.manager: KVCacheManager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.port = VllmBlockPool(self.scheduler)
        self.provenance = Provenance(self.manager, rule)
        self.level = 0
        self.requests: dict[str, Request] = {}
        self.clean: set[str] = set()  # started at level 0 and has run at level 0 only
        self.slots: dict[tuple[int, int], tuple[tuple[int, ...], bool]] = {}  # -> tokens, degraded
        self.fence: int | None = None

    def step(self, request: Request) -> bool:
        """Schedule and run all tokens `request` has not computed; False if there is no room."""
        known = None
        computed = request.num_computed_tokens
        if computed == 0:
            known, computed, _ = self.manager.get_computed_blocks(request)
        new = self.manager.allocate_slots(
            request, request.num_tokens - computed, computed - request.num_computed_tokens, known
        )
        if new is None:
            return False
        limit = self.port.num_kv_blocks if self.fence is None else self.fence
        given = new.get_block_ids()[0]
        assert all(block_id < limit or block_id in self.port._tail for block_id in given), (given, limit)
        if request.num_computed_tokens == 0 and self.level == 0:
            self.clean.add(request.request_id)
        if self.level > 0:
            self.clean.discard(request.request_id)
        self.requests[request.request_id] = request
        request.num_computed_tokens = computed
        self._forward(request)
        return True

    def _forward(self, request: Request) -> None:
        tokens = tuple(request.all_token_ids)
        degraded = self.level > 0 or any(flag for _, flag in self.context(request))
        table = self.manager.get_block_ids(request.request_id)[0]
        for position in range(request.num_computed_tokens, len(tokens)):
            self.slots[table[position // BLOCK], position % BLOCK] = (tokens[: position + 1], degraded)
        request.num_computed_tokens = len(tokens)

    def context(self, request: Request) -> list[tuple[tuple[int, ...], bool]]:
        """What the request's block table reads for every computed position; KeyError = unmapped."""
        table = self.manager.get_block_ids(request.request_id)[0]
        positions = range(request.num_computed_tokens)
        return [self.slots[table[p // BLOCK], p % BLOCK] for p in positions]

    def end(self, request_id: str) -> None:
        self.manager.free(self.requests.pop(request_id))
        self.provenance.forget(request_id)
        self.clean.discard(request_id)

    def preempt(self, request_id: str) -> Request:
        """Frees the KV; the caller may `step` the request again, from zero."""
        request = self.requests.pop(request_id)
        self.manager.free(request)
        request.num_computed_tokens = 0
        self.clean.discard(request_id)
        return request

    def set_level(self, level: int) -> None:
        """What the scheduler hook does at a switch."""
        self.provenance.set_level(level)
        self.level = level

    def begin(self, num_blocks: int) -> None:
        self.port.begin_shrink(num_blocks)
        self.fence = num_blocks

    def advance(self, max_copies: int) -> int:
        """Rename and copy; returns the number of live tail blocks."""
        progress = self.port.advance_shrink(max_copies)
        assert len(progress.copies) <= max_copies
        for src, dst in progress.copies:
            assert dst < self.fence <= src
            self._drop(range(dst, dst + 1))
            for slot in range(BLOCK):
                if (src, slot) in self.slots:
                    self.slots[dst, slot] = self.slots[src, slot]
        return progress.num_live_tail

    def finish(self) -> None:
        old = self.port.num_kv_blocks
        self.port.finish_shrink()
        self._drop(range(self.port.num_kv_blocks, old))
        self.fence = None

    def cancel(self) -> None:
        self.port.cancel_shrink()
        self.fence = None

    def _drop(self, blocks: range) -> None:
        for block in blocks:
            for slot in range(BLOCK):
                self.slots.pop((block, slot), None)


def check_invariants(kv: KVModel) -> None:
    """Everything that must hold between two steps."""
    pool, port = kv.pool, kv.port
    limit = port.num_kv_blocks if kv.fence is None else kv.fence
    assert [b.block_id for b in pool.blocks] == list(range(port.num_kv_blocks))
    assert pool.blocks[0] is pool.null_block

    tables = {r: kv.manager.coordinator.single_type_managers[0].req_to_blocks[r] for r in kv.requests}
    held = Counter(b.block_id for blocks in tables.values() for b in blocks)
    assert {b.block_id: b.ref_cnt for b in pool.blocks[1:] if b.ref_cnt} == held
    assert all(pool.blocks[b.block_id] is b for blocks in tables.values() for b in blocks)

    free = [b.block_id for b in pool.free_block_queue.get_all_free_blocks()]
    vacant = [b.block_id for b in port._vacant]
    tail = {i for i in (*free, *held) if i >= limit}
    assert tail == port._tail.keys()
    assert sorted([*free, *held, *vacant]) == [*range(1, limit), *sorted(tail)]
    assert len(vacant) == len(tail) or (len(vacant) < len(tail) and not free), "traffic can take the tail's room"
    assert pool.get_num_free_blocks() == len(free)

    assert port.num_used_blocks == len(held)
    assert isclose(pool.get_usage(), len(held) / (len(held) + len(free)))
    for block_hash, entry in pool.cached_block_hash_to_block._cache.items():
        blocks = entry if isinstance(entry, dict) else {entry.block_id: entry}
        for block_id, block in blocks.items():
            assert pool.blocks[block_id] is block
            assert block.block_hash == block_hash
            assert block_id < limit or block_id in tail
    for block in pool.blocks:
        if block.block_hash is not None:
            assert pool.cached_block_hash_to_block.contain(block.block_hash, block.block_id)

    for request_id, request in kv.requests.items():
        tokens = tuple(request.all_token_ids)
        context = kv.context(request)
        assert [read for read, _ in context] == [tokens[: p + 1] for p in range(len(context))]
        if request_id in kv.clean:
            assert not any(degraded for _, degraded in context), f"{request_id} reads degraded KV"
