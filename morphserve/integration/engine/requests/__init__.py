"""What requests ask of an engine that morphs, and what becomes of them.

`request_limits` are the latencies that a request is judged by, `floors` the level that it must not be served below,
`receipts` what its answer depends on; of all that requests do `traffic` tells the monitor.
"""

from __future__ import annotations

from morphserve.integration.engine.requests.floors import FloorGate
from morphserve.integration.engine.requests.receipts import Receipts
from morphserve.integration.engine.requests.traffic import StepInFlight, Traffic

__all__ = ["FloorGate", "Receipts", "StepInFlight", "Traffic"]
