"""From decisions to plans: the state machine that moves all ranks to a level. No torch, no vLLM."""

from __future__ import annotations

from morphserve.controller.controller import Controller
from morphserve.controller.counters import Counters
from morphserve.controller.decision_log import DecisionLog
from morphserve.controller.ledger import Ledger, Ledgers, largest_chunk_bytes, layers_within, make_ledgers
from morphserve.controller.log_format import make_header
from morphserve.controller.ports import (
    BlockPoolPort,
    EngineView,
    ExecutorPort,
    Plan,
    Reply,
    ShrinkProgress,
    Ticket,
)
from morphserve.controller.transition import Phase

__all__ = [
    "BlockPoolPort",
    "Controller",
    "Counters",
    "DecisionLog",
    "EngineView",
    "ExecutorPort",
    "Ledger",
    "Ledgers",
    "Phase",
    "Plan",
    "Reply",
    "ShrinkProgress",
    "Ticket",
    "largest_chunk_bytes",
    "layers_within",
    "make_header",
    "make_ledgers",
]
