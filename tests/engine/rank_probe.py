"""What a test lets the workers of an engine do, through `collective_rpc`: each gets the worker first.

A module of its own, because a worker imports it: functions travel by name.
"""

from __future__ import annotations

from typing import Any

import pytest

from kv_resize import MapError
from morphserve.integration.worker import _RANK

_PLANTED = pytest.MonkeyPatch()


def stored_files(worker: Any) -> dict[str, tuple[int, int]]:
    """Path of every file of this rank's variants |-> (size, time of writing)."""
    files = sorted(_RANK.layers.store.directory.iterdir())
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.name.startswith("layer-")}


def variant_file(worker: Any, layer: int, fmt: str) -> str:
    """Where this rank reads a layer from."""
    store = _RANK.layers.store
    return str(store.directory / store.entry(layer, fmt).file)


def compilations(worker: Any) -> tuple[dict[str, Any], ...]:
    """Everything that counts a compilation on this rank, in torch and in vLLM."""
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter

    return dict(counters["stats"]), dict(counters["frames"]), dict(vars(compilation_counter))


def skip(worker: Any, rank: int, target: str) -> None:
    """On one rank, `target` (package.module.Class.method) does nothing any more."""
    if worker.rank == rank:
        _PLANTED.setattr(target, lambda *args, **kwargs: None)


def no_memory(worker: Any, rank: int) -> None:
    """On one rank, the system gives no page to the KV cache any more."""

    def refuse(self: Any, num_blocks: int) -> None:
        raise MapError(num_blocks, self.num_mapped, self.num_mapped, "planted")

    if worker.rank == rank:
        _PLANTED.setattr("kv_resize.ElasticCache.map", refuse)


def swap_alone(worker: Any, rank: int, fmt: str) -> None:
    """One rank changes its layers past the controller."""
    if worker.rank == rank:
        layers = _RANK.layers
        layers.prepare(dict.fromkeys(layers.linears, fmt))
        layers.swapper.commit()


def heal(worker: Any) -> None:
    """Take back whatever was planted."""
    _PLANTED.undo()
