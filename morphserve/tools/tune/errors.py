"""What can go wrong in a tuning study that its user can repair."""

from __future__ import annotations

from morphserve.errors import MorphServeError


class TuningError(MorphServeError, ValueError):
    """The search space, the windows or the study file do not fit together."""
