"""What can go wrong in a replay that its user can repair."""

from __future__ import annotations

from morphserve.errors import MorphServeError


class WorkloadError(MorphServeError, ValueError):
    """A workload file, or what was asked of it, cannot be replayed."""


class ReplayError(MorphServeError, RuntimeError):
    """A server or a run of the comparison failed."""
