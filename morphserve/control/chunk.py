"""A chunk: a few layers, and the KV blocks they pay for. `runner.py` carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from morphserve.control.drain import Drain
from morphserve.control.picking import LayerFormats
from morphserve.control.ports import Plan
from morphserve.control.transition import Direction, Outcome


@dataclass(frozen=True, slots=True)
class ChunkEnd:
    """How a chunk ended. `committed`: now nearer to `toward`. Else everything is as before it began."""

    outcome: Outcome
    num_layers: int = 0
    format: str = ""
    error: str = ""
    place: str = "prepare"  # what an abort counts as among the errors; "" = as none
    num_kv_blocks: int = 0  # that a drain was to get down to and has not


@dataclass(slots=True)
class Chunk:
    """One under way, and how far it is."""

    toward: int  # the rung it approaches
    direction: Direction
    layers: LayerFormats
    new_bytes: tuple[int, ...]  # by rank: staged
    old_bytes: tuple[int, ...]  # by rank: freed on commit
    blocks_before: int
    blocks_after: int
    revision: int
    drain: Drain | None = None  # of the blocks that it gives up
    plan: Plan | None = None
    worker_s: float = 0.0  # what prepare took on the slowest rank
    end: ChunkEnd | None = None
    exposure_before: int = 0  # what tokens count at if the switch fails
