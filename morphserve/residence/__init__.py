"""Where a rank's decoder layers and KV blocks have their bytes: one interface, two places. No vLLM in here.

`base` says what a rank asks for. `host`: packed layers in files, linears built when they come, blocks in pages of the
system. `paged`: layers and blocks exchange pages of device memory, at addresses that never change; whatever waits for
the device is done on a thread of its own, beside the forward passes. `transition` is the same for both.
"""

from importlib.metadata import entry_points

from morphserve.residence.base import BaseLinear, Parts, PartsKey, RankSizes, Residence
from morphserve.residence.errors import GraphSetError, WeightError
from morphserve.residence.graphs.caches import Entries, Formats, Holder, Watch
from morphserve.residence.graphs.graph_sets import GraphSets
from morphserve.residence.graphs.output_alias import OutputAlias
from morphserve.residence.graphs.routes import PIECEWISE, Offer, Route, narrow_candidates, narrow_keys, spaced
from morphserve.residence.graphs.weight_linear import WeightSlot, addresses_used, register_op, reset, slots
from morphserve.residence.host import AtOnce, HostResidence, StoredParts
from morphserve.residence.host_memory import peak_beyond_now
from morphserve.residence.paged.copier import Copier, CudaCopier, HostCopier
from morphserve.residence.paged.layout import Layout, Place
from morphserve.residence.paged.parts import PagedParts
from morphserve.residence.paged.residence import (
    PagedResidence,
    numbered,
    page_size,
    start_thread,
)
from morphserve.residence.paged.weights import WeightArena
from morphserve.residence.reader import Patience, Reader
from morphserve.residence.transition import ElasticKV, RankTransition

ENTRY_POINTS = "morphserve.residences"  # name: a type of device; object: a class like the two below
_OURS: dict[str, type[Residence]] = {"cpu": HostResidence, "cuda": PagedResidence}


def residence_of(device_type: str) -> type[Residence] | None:
    """Return what holds layers and KV on a type of device: what a package registers, else ours; None for no such."""
    for entry in entry_points(group=ENTRY_POINTS, name=device_type):
        registered: type[Residence] = entry.load()
        return registered
    return _OURS.get(device_type)


__all__ = [
    "ENTRY_POINTS",
    "PIECEWISE",
    "AtOnce",
    "BaseLinear",
    "Copier",
    "CudaCopier",
    "ElasticKV",
    "Entries",
    "Formats",
    "GraphSetError",
    "GraphSets",
    "Holder",
    "HostCopier",
    "HostResidence",
    "Layout",
    "Offer",
    "OutputAlias",
    "PagedParts",
    "PagedResidence",
    "Parts",
    "PartsKey",
    "Patience",
    "Place",
    "RankSizes",
    "RankTransition",
    "Reader",
    "Residence",
    "Route",
    "StoredParts",
    "Watch",
    "WeightArena",
    "WeightError",
    "WeightSlot",
    "addresses_used",
    "narrow_candidates",
    "narrow_keys",
    "numbered",
    "page_size",
    "peak_beyond_now",
    "register_op",
    "reset",
    "residence_of",
    "slots",
    "spaced",
    "start_thread",
]
