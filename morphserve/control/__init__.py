"""From decisions to plans: the state machine that moves all ranks to a level. No torch, no vLLM."""

from __future__ import annotations

from morphserve.control.budget import (
    Ledger,
    Ledgers,
    RankBytes,
    largest_chunk_bytes,
    layers_within,
    make_ledgers,
    most_uneven,
)
from morphserve.control.controller import Controller
from morphserve.control.decision_log import DecisionLog, make_header
from morphserve.control.health import Counters, Health
from morphserve.control.ladder import (
    DEFAULT_FORMATS,
    TIMED_BATCHES,
    LayerTimes,
    ProfileLadder,
    build_ladder,
    check_floor,
    ladder_formats,
    optional_formats,
    with_time_factors,
    without_formats,
)
from morphserve.control.monitor import Monitor
from morphserve.control.ranks import BlockPoolPort, EngineView, ExecutorPort, Plan, Reply, ShrinkProgress, Ticket
from morphserve.control.reload import PolicyReloader, ReloadWatch
from morphserve.control.replay_log import print_replay
from morphserve.control.transition import Phase
from morphserve.control.waiting import NO_LIMITS, RequestLimits

__all__ = [
    "BlockPoolPort",
    "Controller",
    "Counters",
    "DEFAULT_FORMATS",
    "DecisionLog",
    "EngineView",
    "ExecutorPort",
    "Health",
    "LayerTimes",
    "Ledger",
    "Ledgers",
    "Monitor",
    "NO_LIMITS",
    "Phase",
    "Plan",
    "PolicyReloader",
    "ProfileLadder",
    "RankBytes",
    "ReloadWatch",
    "Reply",
    "RequestLimits",
    "ShrinkProgress",
    "TIMED_BATCHES",
    "Ticket",
    "build_ladder",
    "check_floor",
    "ladder_formats",
    "largest_chunk_bytes",
    "layers_within",
    "make_header",
    "make_ledgers",
    "most_uneven",
    "optional_formats",
    "print_replay",
    "with_time_factors",
    "without_formats",
]
