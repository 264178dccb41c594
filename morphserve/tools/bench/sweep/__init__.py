"""Several runs on several windows: measured on servers that stay up, and simulated beside them."""

from __future__ import annotations

from morphserve.tools.bench.sweep.cli import main

__all__ = ["main"]
