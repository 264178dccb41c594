"""Decoder layers and KV cache on a device whose memory goes by the page. No vLLM in here.

Weights lie in reserved address ranges, one for each half of a layer and format; which of them has pages is what a
level means. A GPU's work is ordered by streams, so whatever waits for it is done on a thread of its own, beside the
forward passes (`DeviceRank`). With the fakes of `kv_resize` and `HostCopier` all of it runs without a GPU.
"""

from morphserve.residence.errors import GraphBankError, WeightError
from morphserve.residence.graphs.banks import GraphBanks
from morphserve.residence.graphs.landing import Landing
from morphserve.residence.graphs.routes import Offer, Route, narrow_candidates, narrow_keys
from morphserve.residence.graphs.shelves import Entries, Formats, Holder, Watch
from morphserve.residence.graphs.weight_linear import WeightSlot, addresses_used, register_op, reset, slots
from morphserve.residence.paged.copier import Copier, CudaCopier, HostCopier
from morphserve.residence.paged.layout import Layout, Place
from morphserve.residence.paged.memory import DeviceMemory, open_memory, wants_device
from morphserve.residence.paged.rank import DeviceRank, ElasticKV
from morphserve.residence.paged.swapper import DeviceSwapper, layer_bytes
from morphserve.residence.paged.weights import Part, WeightArena

__all__ = [
    "Copier",
    "CudaCopier",
    "DeviceMemory",
    "DeviceRank",
    "DeviceSwapper",
    "ElasticKV",
    "Entries",
    "Formats",
    "GraphBankError",
    "GraphBanks",
    "Holder",
    "HostCopier",
    "Landing",
    "Layout",
    "Offer",
    "Part",
    "Place",
    "Route",
    "Watch",
    "WeightArena",
    "WeightError",
    "WeightSlot",
    "addresses_used",
    "layer_bytes",
    "narrow_candidates",
    "narrow_keys",
    "open_memory",
    "register_op",
    "reset",
    "slots",
    "wants_device",
]
