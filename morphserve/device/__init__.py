"""The parts of the CUDA path that need no vLLM: torch, `quant_layers` and `kv_resize` are all they import."""

from .banks import Entries, Formats, GraphBanks, Holder
from .errors import GraphBankError, WeightError
from .landing import Landing
from .routes import Offer, Route, narrow_candidates, narrow_keys
from .weight_linear import WeightSlot, register_op, reset, slots

__all__ = [
    "Entries",
    "Formats",
    "GraphBankError",
    "GraphBanks",
    "Holder",
    "Landing",
    "narrow_candidates",
    "narrow_keys",
    "Offer",
    "register_op",
    "reset",
    "Route",
    "slots",
    "WeightError",
    "WeightSlot",
]
