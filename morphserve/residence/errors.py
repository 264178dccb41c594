"""Errors of the CUDA path. Each message says the value, the limit and the remedy."""

from __future__ import annotations

from morphserve.errors import MorphServeError


class WeightError(MorphServeError, RuntimeError):
    """A weight has no linear registered, or has its address from another linear's weight."""


class GraphSetError(MorphServeError, RuntimeError):
    """CUDA graphs were to be captured or switched when, or in an order in which, they must not be."""
