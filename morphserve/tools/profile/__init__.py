"""Offline: what a model's layers do to real text, and what their formats cost. Needs transformers, no vLLM.

What is named here loads when it is asked for: commands of this room that neither need transformers nor accelerate
(`calibrate`, `inspect`) run without them, and all read their arguments before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphserve.late import late

if TYPE_CHECKING:
    from morphserve.tools.profile.effects import cost_of
    from morphserve.tools.profile.job import ProfileJob, price_layers, run_profile, swap_order
    from morphserve.tools.profile.measure import measure_apart
    from morphserve.tools.profile.model import StreamedModel
    from morphserve.tools.profile.paper_order import lis_order
    from morphserve.tools.profile.text import token_windows
    from morphserve.tools.profile.workspace import Workspace

__all__ = [
    "ProfileJob",
    "StreamedModel",
    "Workspace",
    "cost_of",
    "lis_order",
    "measure_apart",
    "price_layers",
    "run_profile",
    "swap_order",
    "token_windows",
]

_LATE = {
    "ProfileJob": "job",
    "StreamedModel": "model",
    "Workspace": "workspace",
    "cost_of": "effects",
    "lis_order": "paper_order",
    "measure_apart": "measure",
    "price_layers": "job",
    "run_profile": "job",
    "swap_order": "job",
    "token_windows": "text",
}
__getattr__ = late(__name__, _LATE)
