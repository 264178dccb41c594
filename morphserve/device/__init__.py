"""Decoder layers and KV cache on a device whose memory goes by the page. No vLLM in here.

Weights lie in reserved address ranges, one for each half of a layer and format; which of them has pages is what a
level means. A GPU's work is ordered by streams, so whatever waits for it is done on a thread of its own, beside the
forward passes (`DeviceRank`). With the fakes of `kv_resize` and `HostCopier` all of it runs without a GPU.
"""

from morphserve.device.banks import GraphBanks
from morphserve.device.copier import Copier, CudaCopier, HostCopier
from morphserve.device.errors import GraphBankError, WeightError
from morphserve.device.landing import Landing
from morphserve.device.layout import Layout, Place
from morphserve.device.rank import DeviceRank, ElasticKV
from morphserve.device.routes import Offer, Route, narrow_candidates, narrow_keys
from morphserve.device.shelves import Entries, Formats, Holder, Watch
from morphserve.device.swapper import DeviceSwapper, layer_bytes
from morphserve.device.weight_linear import WeightSlot, addresses_used, register_op, reset, slots
from morphserve.device.weights import Part, WeightArena

__all__ = [
    "addresses_used",
    "Copier",
    "CudaCopier",
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
    "layer_bytes",
    "Layout",
    "narrow_candidates",
    "narrow_keys",
    "Offer",
    "Part",
    "Place",
    "register_op",
    "reset",
    "Route",
    "slots",
    "Watch",
    "WeightArena",
    "WeightError",
    "WeightSlot",
]
