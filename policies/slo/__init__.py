"""Predict what each level would do to the requests that are here, and take the cheapest that keeps the promise."""

from __future__ import annotations

from policies.slo.policy import SloPolicy

__all__ = ["SloPolicy"]
