"""From decisions to plans: the state machine that moves all ranks to a level. No torch, no vLLM."""

from __future__ import annotations

from morphserve.control.controller import Controller
from morphserve.control.counters import Counters
from morphserve.control.decision_log import DecisionLog
from morphserve.control.ledger import Ledger, Ledgers, largest_chunk_bytes, layers_within, make_ledgers
from morphserve.control.log_format import make_header
from morphserve.control.ports import BlockPoolPort, EngineView, ExecutorPort, Plan, Reply, ShrinkProgress, Ticket
from morphserve.control.transition import Phase

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
