"""The states of a change of level, and the moves between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from morphserve.errors import IllegalTransition

Direction = Literal["degrade", "restore"]
Outcome = Literal["committed", "aborted", "cancelled"]


class Phase(Enum):
    """Where one chunk (a few layers and the KV blocks they pay for) stands.

    ::

                  degrade, or a restore that needs no KV
              .------------------------------------------.
              |                                          v
            IDLE --restore--> DRAINING --> SHRINKING --> PREPARING --> COMMITTING --> IDLE
              ^                  |             |             |
              |<-- cancelled ----'             |             v
              |                                |          ABORTING
              |                                v             |
              |<------------------------- REGROWING <--------|  KV had been unmapped
              '<---------------------------------------------'  KV untouched

    DRAINING: the tail is fenced, live blocks move below it. SHRINKING: the tail left the pool (or was
    never published: another rank had mapped less), its unmapping is on its way. PREPARING: ranks stage
    the new layers; the only phase in which a rank may fail or be too late (a single rank switches in it as well).
    COMMITTING: ranks switch; cannot fail. ABORTING: ranks forget what they staged.
    REGROWING: blocks that were unmapped for nothing come back.
    """

    IDLE = auto()
    DRAINING = auto()
    SHRINKING = auto()
    PREPARING = auto()
    COMMITTING = auto()
    ABORTING = auto()
    REGROWING = auto()


_NEXT: Mapping[Phase, frozenset[Phase]] = {
    Phase.IDLE: frozenset({Phase.DRAINING, Phase.SHRINKING, Phase.PREPARING}),
    Phase.DRAINING: frozenset({Phase.SHRINKING, Phase.IDLE}),
    Phase.SHRINKING: frozenset({Phase.PREPARING, Phase.REGROWING}),
    Phase.PREPARING: frozenset({Phase.COMMITTING, Phase.ABORTING}),
    Phase.COMMITTING: frozenset({Phase.IDLE}),
    Phase.ABORTING: frozenset({Phase.REGROWING, Phase.IDLE}),
    Phase.REGROWING: frozenset({Phase.IDLE}),
}


def check_move(revision: int, old: Phase, new: Phase) -> Phase:
    """`new`, if the table has the move.

    Raises:
        IllegalTransition: it has not.
    """
    if new not in _NEXT[old]:
        legal = ", ".join(sorted(phase.name for phase in _NEXT[old]))
        raise IllegalTransition(
            f"transition r{revision}: {old.name} -> {new.name}; legal from here: {legal}."
        )
    return new


@dataclass(slots=True)
class Transition:
    """From the first chunk in one direction until idle again, or until the direction turns.

    Its revision is the first of a rising run that its plans continue.
    """

    revision: int
    direction: Direction
    from_level: int
    reason: str
    started_s: float
    blocks_before: int
    num_layers: int = 0  # layer switches committed so far
    last_format: str = ""
