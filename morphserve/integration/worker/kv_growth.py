"""Who backs new KV blocks on a rank: we do, until vLLM can extend its own cache.

vLLM is building `extend_kv_cache`, which maps pages behind the ones it has under the same addresses, so that captured
graphs stay valid (vllm PR 56492, `--enable-extensible-kv-cache`). It only grows, and is meant for start-up. No
supported vLLM has it: `growth_of` answers with our own, and the worker calls that directly. When one has it, this is
the half of `RankKV` it can replace; shrinking stays ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from morphserve.integration.seams import OPTIONAL, check_seam

logger = logging.getLogger("vllm.morphserve")


class KVGrowth(Protocol):
    """Growing on one rank. `RankKV` is one."""

    @property
    def num_mapped(self) -> int:
        """Blocks that are backed by memory, null block included."""
        ...

    def map(self, num_blocks: int) -> None:
        """Back blocks up to `num_blocks`, zeroed, or as many as there is memory for. Never raises."""
        ...


class ExtendedByVllm:
    """`KVGrowth` through vLLM's own method."""

    def __init__(self, extend: Callable[[int], Any], num_mapped: int) -> None:
        self._extend = extend
        self.num_mapped = num_mapped

    def map(self, num_blocks: int) -> None:
        """All of them or none."""
        if num_blocks <= self.num_mapped:
            return
        try:
            self._extend(num_blocks)
        except Exception as e:
            # A commit cannot fail any more: the reply says how many blocks there are.
            logger.warning("morphserve: no more KV blocks: vLLM did not extend its cache: %s", e)
        else:
            self.num_mapped = num_blocks


def vllm_extends() -> bool:
    """Whether the installed vLLM can extend a KV cache."""
    return any(seam.name == "kv_extend" and check_seam(seam).ok for seam in OPTIONAL)


def growth_of(runner: Any, ours: KVGrowth) -> KVGrowth:
    """vLLM's growth where this rank's model runner has it, else ours."""
    extend = getattr(runner, "extend_kv_cache", None)
    return ours if extend is None else ExtendedByVllm(extend, ours.num_mapped)
