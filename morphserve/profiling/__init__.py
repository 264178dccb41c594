"""Offline: what a model's layers do to real text, and what their formats cost. Needs transformers, no vLLM."""

from .effects import LayerEffects, backward_sweep, cost_of, forward_sweep
from .job import ProfileJob, run_profile, swap_order
from .model import StreamedModel
from .paper_order import lis_order
from .text import decoder_layers, token_windows
from .variants import RoundToNearest, Variant
from .workspace import Workspace

__all__ = [
    "LayerEffects",
    "ProfileJob",
    "RoundToNearest",
    "StreamedModel",
    "Variant",
    "Workspace",
    "backward_sweep",
    "cost_of",
    "decoder_layers",
    "forward_sweep",
    "lis_order",
    "run_profile",
    "swap_order",
    "token_windows",
]
