"""From decisions to plans: the state machine that moves all ranks to a level. No torch, no vLLM.

One step, from the top:

    controller       ticks: asks, has transitions carried out, publishes
    monitor          what the policy needs to know of the past; `waiting`: of the queue
    decisions        the policy that is asked, under an operator's orders; what it answered is logged, and asked again
    reload           another policy while it runs
    transition_book  the transition under way, those that ended last, when the next may start
    health           what has gone wrong, and what is counted
    doubt            what a failed command leaves in doubt, and what ends the doubt
    runner           carries out one swap batch of a transition, phase by phase
    transition       the phases, the swap batch under way, the drain that makes room for it
    layer_state      the level as it is, layer by layer, and which layers go next
    budget           what every rank may hold, in bytes
    ladder           the levels there are
    ranks            the ports: ranks, their answers, the block pool, the engine

Here a level is the current one, deepest that all layers have reached, or a target: of a transition what the policy
wants, of a swap batch the next level on the way there. Between two levels tokens count at the deeper,
`effective_level`.
"""

from __future__ import annotations

from morphserve.config import DEFAULT_FORMATS
from morphserve.control.budget import (
    Ledger,
    Ledgers,
    RankBytes,
    kv_granularity,
    largest_batch_bytes,
    layers_within,
    make_ledgers,
    most_uneven,
)
from morphserve.control.controller import Controller
from morphserve.control.decisions import (
    ORDERS,
    Action,
    DecisionLog,
    OrderBody,
    ReloadBody,
    make_header,
    parse_order,
    print_replay,
)
from morphserve.control.health import Counters, Health
from morphserve.control.ladder import (
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
from morphserve.control.transition import Direction, ErrorPlace, Outcome, Phase
from morphserve.control.waiting import NO_LIMITS, RequestLimits, WaitingRequest

__all__ = [
    "Action",
    "BlockPoolPort",
    "Controller",
    "Counters",
    "DEFAULT_FORMATS",
    "DecisionLog",
    "Direction",
    "EngineView",
    "ErrorPlace",
    "ExecutorPort",
    "Health",
    "LayerTimes",
    "Ledger",
    "Ledgers",
    "Monitor",
    "OrderBody",
    "NO_LIMITS",
    "ORDERS",
    "Outcome",
    "Phase",
    "Plan",
    "PolicyReloader",
    "ProfileLadder",
    "RankBytes",
    "ReloadBody",
    "ReloadWatch",
    "Reply",
    "RequestLimits",
    "ShrinkProgress",
    "TIMED_BATCHES",
    "Ticket",
    "WaitingRequest",
    "build_ladder",
    "check_floor",
    "ladder_formats",
    "kv_granularity",
    "largest_batch_bytes",
    "layers_within",
    "make_header",
    "make_ledgers",
    "most_uneven",
    "optional_formats",
    "parse_order",
    "print_replay",
    "with_time_factors",
    "without_formats",
]
