"""Offline: what a model's layers do to real text, and what their formats cost. Needs transformers, no vLLM."""

from morphserve.tools.profile.effects import LayerEffects, backward_sweep, cost_of, forward_sweep
from morphserve.tools.profile.job import ProfileJob, run_profile, swap_order
from morphserve.tools.profile.model import StreamedModel
from morphserve.tools.profile.paper_order import lis_order
from morphserve.tools.profile.text import decoder_layers, token_windows
from morphserve.tools.profile.variants import RoundToNearest, Variant
from morphserve.tools.profile.workspace import Workspace

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
