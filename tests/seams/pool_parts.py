"""What the driver and the LRU comparison build on: readable hashes, a manager, the controller's pool with its model."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from seams.pool_harness import MAX_MODEL_LEN, WATERMARK, full_attention, kv_config, vllm_config
from seams.pool_model import BLOCK, PoolModel
from vllm import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from morphserve.control import ShrinkProgress
from morphserve.integration.engine.block_pool import VllmBlockPool


def _exact(parts: tuple[bytes, tuple[int, ...], Any]) -> bytes:
    """A block hash that is the tokens themselves: what the cache holds can be read, and nothing collides."""
    parent, tokens, _ = parts
    return (b"" if parent == kv_cache_utils.NONE_HASH else parent) + bytes(tokens)


_HASHER = kv_cache_utils.get_request_block_hasher(BLOCK, _exact)
_PARAMS = SamplingParams(max_tokens=MAX_MODEL_LEN)


def new_request(name: str, tokens: list[int]) -> Request:
    return Request(name, tokens, _PARAMS, None, block_hasher=_HASHER)


def make_manager(num_blocks: int) -> tuple[KVCacheManager, Any]:
    config = kv_config(full_attention(), num_blocks=num_blocks)
    manager = KVCacheManager(
        config,
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=True,
        watermark=WATERMARK,
    )
    scheduler = SimpleNamespace(
        vllm_config=vllm_config(),
        kv_cache_config=config,
        kv_cache_manager=manager,
        cache_config=SimpleNamespace(num_gpu_blocks=num_blocks),
        scheduler_config=SimpleNamespace(watermark=WATERMARK),
    )
    return manager, scheduler


class CheckedPool:
    """The controller's pool: the real one, and the model after it."""

    def __init__(self, real: VllmBlockPool, model: PoolModel, counts: Counter[str]) -> None:
        self.real = real
        self.model = model
        self._counts = counts

    num_kv_blocks = property(lambda self: self.real.num_kv_blocks)
    num_used_blocks = property(lambda self: self.real.num_used_blocks)

    def grow(self, num_kv_blocks: int) -> None:
        self._counts["grow"] += 1
        self.real.grow(num_kv_blocks)
        self.model.grow(num_kv_blocks)

    def begin_shrink(self, num_kv_blocks: int) -> None:
        self._counts["begin_shrink"] += 1
        self.real.begin_shrink(num_kv_blocks)
        self.model.begin_shrink(num_kv_blocks)

    def advance_shrink(self, max_copies: int) -> ShrinkProgress:
        progress = self.real.advance_shrink(max_copies)
        assert len(progress.copies) <= max_copies
        assert list(progress.copies) == self.model.advance_shrink(max_copies), "copies"
        assert progress.num_live_tail == len(self.model.tail)
        self._counts["advance_shrink"] += 1
        self._counts["blocks_copied"] += len(progress.copies)
        return progress

    def finish_shrink(self) -> None:
        self._counts["finish_shrink"] += 1
        self.real.finish_shrink()
        self.model.finish_shrink()

    def cancel_shrink(self) -> None:
        self._counts["cancel_shrink"] += 1
        self.real.cancel_shrink()
        self.model.cancel_shrink()
