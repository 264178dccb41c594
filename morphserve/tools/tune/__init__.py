"""Find the policy for one's own traces: a search over the keys of the YAML, each trial simulated."""

from __future__ import annotations

from morphserve.tools.tune.cli import main
from morphserve.tools.tune.errors import TuningError

__all__ = ["TuningError", "main"]
