"""Block ids that a model runner keeps between steps, renamed when blocks have moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

Pairs = Sequence[tuple[int, int]]  # (source, destination)


def rewrite_block_tables(runner: GPUModelRunner, pairs: Pairs, num_blocks: int) -> None:
    """Rename blocks in everything that the runner caches.

    V2 (vllm/v1/worker/gpu/block_table.py): tables on the device alone; ids that the scheduler sends are written there
    within the step that brings them. V1: `requests[*].block_ids` and the rows of `input_batch.block_table`, on the host
    (vllm/v1/worker/gpu_model_runner.py, block_table.py), from where each step copies them.
    """
    tables = getattr(runner, "block_tables", None)
    if tables is not None:
        _rewrite_on_device(tables, pairs, num_blocks)
    else:
        _rewrite_on_host(runner, pairs, num_blocks)


def forget_blocks(runner: GPUModelRunner, num_blocks: int) -> None:
    """Name no block from `num_blocks` on in tables on a device: their pages go, and no request has them any more.

    Behind a row's end the ids of earlier requests stay, in the tables and in what graphs read. FlashAttention 3 loads
    nothing there; of other kernels that is not known. V1 writes its rows anew from the host.
    """
    tables = getattr(runner, "block_tables", None)
    if tables is None:
        return
    for rows in (*(table.gpu for table in tables.block_tables), *tables.input_block_tables):
        rows.masked_fill_(rows >= num_blocks, 0)


def _rewrite_on_device(tables: Any, pairs: Pairs, num_blocks: int) -> None:
    lookup: torch.Tensor | None = None
    for table in tables.block_tables:
        rows = table.gpu
        if lookup is None:
            lookup = _on(rows.device, torch.from_numpy(_lookup(pairs, num_blocks, np.int32)))
        rows.copy_(lookup[rows])


def _on(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """Copy to the device and go on; a copy from memory that is not pinned would wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _rewrite_on_host(runner: GPUModelRunner, pairs: Pairs, num_blocks: int) -> None:
    renamed = dict(pairs)
    for state in runner.requests.values():
        for ids in state.block_ids:
            for i, block in enumerate(ids):
                if block in renamed:
                    ids[i] = renamed[block]
    lookup: np.ndarray | None = None
    for table in runner.input_batch.block_table.block_tables:
        rows = table.block_table.np
        if lookup is None:
            lookup = _lookup(pairs, num_blocks, rows.dtype)
        rows[:] = lookup[rows]


def _lookup(pairs: Pairs, num_blocks: int, dtype: np.typing.DTypeLike) -> np.ndarray:
    lookup = np.arange(num_blocks, dtype=dtype)
    for source, destination in pairs:
        lookup[source] = destination
    return lookup
