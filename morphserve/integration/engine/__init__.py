"""The engine-core process: vLLM's scheduler with the controller in front of it."""

from __future__ import annotations

from morphserve.integration.engine.wiring import install

__all__ = ["install"]
