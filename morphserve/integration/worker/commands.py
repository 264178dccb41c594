"""How a rank answers a plan: never with an exception, and never to a plan that it has passed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from kv_resize import KVResizeError
from morphserve.control import Plan, Reply
from morphserve.errors import MorphServeError
from quant_layers import QuantError

logger = logging.getLogger("vllm.morphserve")

_SAID_WHOLE = (QuantError, KVResizeError, MorphServeError, TimeoutError)


class KVUnknown(RuntimeError):
    """Copies or block tables are half done."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a rank holds when it answers."""

    num_kv_blocks: int
    weight_bytes: int
    staging_bytes: int
    short_of: str = ""  # why it has fewer KV blocks than it was asked for


class Commands:
    """The plans that one rank has met."""

    def __init__(self) -> None:
        self.revision = -1  # of the last plan that was committed or aborted

    def answer(
        self,
        rank: int,
        plan: Plan,
        action: Callable[[], bool | None],
        figures: Callable[[], Figures],
        *,
        final: bool = False,
        again: bool = False,
    ) -> Reply:
        """Run `action`; a failure becomes a reply, because one rank alone must not stop the engine.

        Args:
            rank: global rank.
            plan: that the command came with.
            action: what it asks for. Returns True where it goes on in the background.
            figures: read after that was known, so that they are final when it does not.
            final: no further command may carry this plan's revision.
            again: this one asks how a command went on that has carried it.
        """
        start = time.perf_counter()
        ok, error, kv_moved, pending = True, "", True, False
        try:
            # Revision 0 stands outside of every transition: it publishes level 0's blocks at start.
            if 0 < plan.revision <= self.revision and not again:
                kv_moved = not plan.copies
                raise ValueError(f"plan r{plan.revision} came after r{self.revision}: refused")
            if final:
                self.revision = max(self.revision, plan.revision)
            pending = bool(action())
        except Exception as e:
            ok, error, kv_moved = False, f"{type(e).__name__}: {e}", kv_moved and not isinstance(e, KVUnknown)
            # What the controller's warning says whole needs no traceback: a file, a disk, memory, a format.
            level = logging.DEBUG if isinstance(e, _SAID_WHOLE) else logging.ERROR
            logger.log(level, "morphserve: rank %d, plan r%d failed", rank, plan.revision, exc_info=True)
        elapsed_s = time.perf_counter() - start
        found = figures()
        return Reply(
            rank=rank,
            revision=plan.revision,
            ok=ok,
            error=error or found.short_of,
            elapsed_s=elapsed_s,
            num_kv_blocks=found.num_kv_blocks,
            weight_bytes=found.weight_bytes,
            staging_bytes=found.staging_bytes,
            kv_moved=kv_moved,
            pending=pending,
        )
