"""Where vLLM looks up which CUDA graph a step may ask for, narrowed to the graphs that there are.

vLLM chooses the descriptor first and looks for the graph afterwards; where there is none it fails (a whole-model
graph) or captures one in the middle of serving (a piece). So what a graph set lacks must not be chosen: with
the table narrowed, vLLM's own rules go on to the next best: FULL, then PIECEWISE of the same formats, then eager.

Tables of vLLM 0.32 are read here by the attributes they have, never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

PIECEWISE = "PIECEWISE"  # names in vLLM's CUDAGraphMode
FULL = "FULL"


@dataclass(frozen=True, slots=True)
class Offer:
    """Descriptors for which every graph that a step needs is there."""

    full: frozenset[Any] = frozenset()  # one graph for the whole step
    piecewise: frozenset[Any] = frozenset()  # one graph a piece, and all pieces have it


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """`owner.attribute` is vLLM's table; `narrow(table, offer)` makes another of the same form and keeps it whole."""

    owner: Any
    attribute: str
    narrow: Callable[[Any, Offer], Any]


def narrow_candidates(table: Mapping[Any, Sequence[Any]], offer: Offer) -> dict[Any, list[Any]]:
    """Narrow `_candidates` of V2's CudaGraphManager: (num_tokens, num_active_loras) |-> descriptors, best first.

    A size that was left out is served by the next larger graph there is: vLLM pads to it as it pads to any.
    """
    sizes = {(key.num_tokens, key.num_active_loras) for key in offer.piecewise}
    narrowed: dict[Any, list[Any]] = {}
    larger: dict[Any, tuple[list[Any], list[Any]]] = {}  # by num_active_loras: what the next more tokens have
    for key in sorted(table, reverse=True):
        full = [desc for desc in table[key] if desc in offer.full]
        pieces = [
            desc
            for desc in table[key]
            if desc.cg_mode.name == PIECEWISE and (desc.num_tokens, desc.num_active_loras) in sizes
        ]
        above = larger.get(key[1], ([], []))
        larger[key[1]] = found = (full or above[0], pieces or above[1])
        narrowed[key] = [*found[0], *found[1]]
    return narrowed


def spaced(sizes: Collection[int], most_padding: float) -> frozenset[int]:
    """Return the fewest of these sizes that pad no step beyond `most_padding` times its tokens, unless all of them do.

    Graphs cost memory by their number, and padded rows little: a decode step's time goes into reading weights.
    """
    kept: list[int] = []
    for size, smaller in pairwise([*sorted(sizes, reverse=True), 0]):
        # Without this size, steps just above the next smaller one would run at the last that was kept.
        if not kept or kept[-1] > most_padding * (smaller + 1):
            kept.append(size)
    return frozenset(kept)


def narrow_keys(table: Mapping[Any, set[Any]], offer: Offer) -> dict[Any, set[Any]]:
    """Narrow `cudagraph_keys` of the V1 runner's CudagraphDispatcher: mode |-> descriptors.

    It pads to the next capture size before it asks, so a size that was left out falls to PIECEWISE or to eager.
    """
    return {mode: keys & (offer.full if mode.name == FULL else offer.piecewise) for mode, keys in table.items()}
