"""Shedding: the policy's limit on waiting prompt tokens becomes vLLM's own (`max_num_queued_tokens`, 503 at the door).

vLLM asks its scheduler config at every request, in the API server (vllm/v1/engine/async_llm.py, `check_admission`). The
policy answers in the engine, so the limit follows the poll of the status, half a second late at most.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.exceptions import MaxQueuedTokensError

from morphserve.integration import seams
from morphserve.integration.server.scrape import Refusals

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger("vllm.morphserve")


class QueueLimit:
    """The stricter of what the user set and what the policy asks for now."""

    def __init__(self, engine_client: EngineClient, refusals: Refusals) -> None:
        """Set no limit yet. `refusals`: where those are counted whom ours refuses."""
        self._refusals = refusals
        self._config = getattr(engine_client, "scheduler_config", None)
        self._own: int | None = getattr(self._config, "max_num_queued_tokens", None)
        # Each API server counts what it has taken itself.
        parallel = getattr(getattr(engine_client, "vllm_config", None), "parallel_config", None)
        self._num_doors: int = getattr(parallel, "_api_process_count", 1)
        self._policys: int | None = None

    def apply(self, limits: Sequence[int | None]) -> None:
        """Set what each engine behind this API server takes, together their sum; None = takes all.

        Several API servers have a share each.
        """
        known = [limit for limit in limits if limit is not None]
        share = max(sum(known) // self._num_doors, 1) if any(known) else 0  # 0 = an order refuses all
        limit = share if known and len(known) == len(limits) else None
        if self._config is None or limit == self._policys:
            return
        if (limit is None) != (self._policys is None):
            if limit is None:
                logger.info("morph: new requests are taken again")
            else:
                logger.warning("morph: new requests beyond %d queued tokens get a 503: see the status' reason", limit)
        self._policys = limit
        bounds = [bound for bound in (self._own, limit) if bound is not None]
        seams.put(seams.DOOR_LIMIT, "max_num_queued_tokens", min(bounds, default=None), self._config)

    def note_refusals(self, original: Callable[..., None]) -> Callable[..., None]:
        """Wrap vLLM's check of the door: what it refuses by our limit is counted, not what it does by the user's."""

        @functools.wraps(original)
        def check_admission(*args: Any, **kwargs: Any) -> None:
            try:
                original(*args, **kwargs)
            except MaxQueuedTokensError:
                if self._policys is not None and (self._own is None or self._policys < self._own):
                    self._refusals.count("shed" if self._policys else "drain")
                raise

        return check_admission
