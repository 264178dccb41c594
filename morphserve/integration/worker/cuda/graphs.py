"""CUDA graphs of every level, captured at start by vLLM's own capture, with the layers really at that level."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations_with_replacement
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from morphserve.integration.worker.cuda.capture_stream import one_capture_stream
from morphserve.residence import (
    PIECEWISE,
    GraphSets,
    Holder,
    RankTransition,
    Route,
    addresses_used,
    narrow_candidates,
    narrow_keys,
    spaced,
)
from quant_layers import LayerSwapper

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = logging.getLogger("vllm.morphserve")

_LAYERS_AT_ONCE = 1  # what the staging reserve holds for certain
# Tokens that a step computes over those that it has: at levels above 0, and at the formats between two, which pass.
_MOST_PADDING, _MOST_PADDING_BETWEEN = 4 / 3, 2.0
_MOST_OVER_A_LEVEL = 1.5  # bytes of a set beside levels over a level's: 1.4 on an H100, 0.5 for the one before it


class LevelGraphs:
    """One graph set a level; levels share the graphs of pieces of the model wherever they agree on a piece's layers.

    Where vLLM's V2 runner captures pieces there are sets of pieces alone besides, with neighbouring layers in each two
    formats that they have: so steps at any formats between two levels run pieces. What has none runs eagerly: slower,
    never wrong.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        swapper: LayerSwapper,
        rank: RankTransition,
        weights: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            runner: vLLM's, V1 or V2.
            swapper: at level 0.
            rank: with nothing under way.
            weights: address of each weight that `linear_of` is given |-> its decoder layer; without them each level has
                pieces of its own.
        """
        self._manager = getattr(runner, "cudagraph_manager", None)
        self._swapper = swapper
        self._rank = rank
        self._set_bytes: list[int] = []  # of each level's set
        self._between_bytes = 0
        places = {layer: place for place, layer in enumerate(sorted(swapper.formats()))}
        self._place_of = {address: places[layer] for address, layer in weights.items()}
        self._sets = GraphSets(
            _holders(runner),
            _routes(runner),
            later_pool=torch.cuda.graph_pool_handle() if weights else None,
            watch=self._watch if weights else None,
        )

    def capture(
        self,
        original: Callable[[], int],
        levels: Sequence[tuple[str, ...]],
        num_kv_blocks: int,
        *,
        kept: int,
        between: bool = True,
    ) -> int:
        """Capture all graph sets; the layers are at level 0 again when it returns.

        Args:
            original: vLLM's capture; its result says how many bytes it took.
            levels: formats of each, by decoder layer id; level 0 first.
            num_kv_blocks: that are mapped, and stay so.
            kept: bytes that the KV budget was charged for each level's set; sets beside levels use what those leave.
            between: there may be sets of pieces alone.

        Returns:
            Bytes that all graph sets take.
        """
        own = sorted(self._swapper.formats())
        # Levels may differ in the layers of other pipeline stages alone.
        distinct = list(dict.fromkeys(tuple(level[layer] for layer in own) for level in levels))
        self._set_bytes.clear()
        self._between_bytes = 0
        with one_capture_stream():
            for formats in distinct:
                self._move(dict(zip(own, formats, strict=True)), num_kv_blocks)
                with _fewer(self._manager if self._set_bytes else None):
                    self._set_bytes.append(self._capture_set(formats, original))
            if between and self._captures_pieces():
                self._capture_between(distinct, original, num_kv_blocks, kept)
        self._move(dict(zip(own, distinct[0], strict=True)), num_kv_blocks)
        self.show()
        return sum(self._set_bytes) + self._between_bytes

    def _capture_between(
        self, levels: Sequence[tuple[str, ...]], original: Callable[[], int], num_kv_blocks: int, kept: int
    ) -> None:
        """Capture pieces alone, for the formats between two levels; see `capture`."""
        own = sorted(self._swapper.formats())
        for both in alternations(levels):
            for formats in self._worth_capturing(both, kept):
                self._move(dict(zip(own, formats, strict=True)), num_kv_blocks)
                with _fewer(self._manager, whole_steps=False):
                    self._between_bytes += self._capture_set(formats, original)

    def _worth_capturing(self, both: Sequence[tuple[str, ...]], kept: int) -> list[tuple[str, ...]]:
        """Return those that give pieces graphs which they lack; none where what is left does not hold all of these."""
        lacking = [formats for formats in both if self._sets.lacks_pieces(formats)]
        later = self._set_bytes[1:]
        of_a_level = sum(later) / max(len(later), 1)
        return lacking if self.unused(kept) >= _MOST_OVER_A_LEVEL * of_a_level * len(lacking) else []

    def _captures_pieces(self) -> bool:
        descs = {} if self._manager is None else self._manager._capture_descs
        return any(mode.name == PIECEWISE for mode in descs)

    def _capture_set(self, formats: tuple[str, ...], original: Callable[[], int]) -> int:
        """Capture graphs of the formats that the layers have, and return the bytes that they take."""
        start = time.perf_counter()
        torch.cuda.empty_cache()  # as vLLM's capture does before it counts
        held = torch.cuda.memory_reserved()
        self._sets.begin(formats)
        try:
            num_bytes = max(original(), 0)  # what the device has less of: others may have let go of more
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # captures warm up on a stream of their own, on pages that go next
        finally:
            has_full = self._sets.end()
        logger.info(
            "morphserve: %d CUDA graphs of a graph set in %.1f s, %.0f MiB, of which %.0f torch's%s",
            self._sets.num_graphs()[formats],
            time.perf_counter() - start,
            num_bytes / 2**20,
            (torch.cuda.memory_reserved() - held) / 2**20,  # the rest is the driver's
            "" if has_full else ", none of whole steps",
        )
        return num_bytes

    def unused(self, kept: int) -> int:
        """Return how many bytes of those kept for the graph sets of levels above 0 their capture has not taken.

        What level 0's set leaves of its own is vLLM's to keep, as it does without levels.

        Args:
            kept: for each graph set.
        """
        first, *later = self._set_bytes
        return max(kept * len(later) - sum(later) - self._between_bytes - max(first - kept, 0), 0)

    def show(self) -> None:
        """Offer the graphs of the formats that the layers have now, and no others."""
        self._sets.switch(self._formats())

    @contextmanager
    def _watch(self) -> Iterator[set[int]]:
        found: set[int] = set()
        with addresses_used() as used:
            yield found
        found.update(self._place_of[address] for address in used)

    def _formats(self) -> tuple[str, ...]:
        """Return the formats of this rank's own layers, by id."""
        return tuple(fmt for _, fmt in sorted(self._swapper.formats().items()))

    def _move(self, formats: Mapping[int, str], num_kv_blocks: int) -> None:
        now = self._swapper.formats()
        changes = [(layer, fmt) for layer, fmt in formats.items() if now[layer] != fmt]
        for start in range(0, len(changes), _LAYERS_AT_ONCE):
            self._rank.prepare(dict(changes[start : start + _LAYERS_AT_ONCE]))
            self._rank.wait()
            self._rank.commit(True, num_kv_blocks)
            self._rank.wait()


def alternations(levels: Sequence[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Yield pairs of formats in which neighbouring layers have two that they have at some level, either way round.

    Args:
        levels: formats of each, by layer in the order of their ids.
    """
    formats = dict.fromkeys(fmt for level in levels for fmt in level)
    of_layers = [tuple(dict.fromkeys(column)) for column in zip(*levels, strict=True)]
    for pair in combinations_with_replacement(formats, 2):
        ways = [[pair[(place + first) % 2] for place in range(len(of_layers))] for first in range(2)]
        found = (tuple(f if f in had else had[0] for f, had in zip(way, of_layers, strict=True)) for way in ways)
        yield list(dict.fromkeys(found))


@contextmanager
def _fewer(manager: Any, whole_steps: bool = True) -> Iterator[None]:
    """Have vLLM capture some of its sizes: graphs above level 0 come off the KV cache that level 0 has.

    Args:
        manager: the V2 runner's, which serves what was left out by the next larger graph. None: nothing changes, as
            where the V1 runner would run such steps without graphs.
        whole_steps: capture these too, not pieces alone.
    """
    if manager is None:
        yield
        return
    every = manager._capture_descs
    kept = {}
    for mode, descs in every.items():
        sizes = spaced({desc.num_tokens for desc in descs}, _MOST_PADDING)
        if not whole_steps:  # some of those that levels have: pieces of both go together
            sizes = spaced(sizes, _MOST_PADDING_BETWEEN)
        if whole_steps or mode.name == PIECEWISE:
            kept[mode] = [desc for desc in descs if desc.num_tokens in sizes]
    manager._capture_descs = kept
    try:
        yield
    finally:
        manager._capture_descs = every


def _holders(runner: GPUModelRunner) -> list[Holder]:
    """Return everything that keeps graphs of the model. Draft models are refused at start (checks.py)."""
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    holders = [
        Holder(wrapper, "concrete_cudagraph_entries", full=is_full, learns=not is_full)
        for wrapper in CUDAGraphWrapper._all_instances
        for is_full in (wrapper.runtime_mode.name == "FULL",)
    ]
    holders += [Holder(wrapper, "entries", full=False) for wrapper in BreakableCUDAGraphWrapper._all_instances]
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None:
        holders.append(Holder(manager, "graphs"))
    return holders


def _routes(runner: GPUModelRunner) -> list[Route]:
    """Return where vLLM looks up which graph a step may ask for."""
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None:
        return [Route(manager, "_candidates", narrow_candidates)]
    return [Route(runner.cudagraph_dispatcher, "cudagraph_keys", narrow_keys)]
