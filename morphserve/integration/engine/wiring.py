"""The engine-core side: plan the KV cache for the whole ladder, then tie the controller to the scheduler.

Order at start (vllm/v1/engine/core.py, EngineCore.__init__): workers load the model -> `_initialize_kv_caches`
(we ask the ranks what their layers weigh) -> `get_kv_cache_configs` (we lay the cache out for the deepest
level) -> the scheduler is built (`attach`: publish only level 0's blocks, start the controller).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from morphserve.control import Action
from morphserve.integration import ending, seams
from morphserve.integration.engine.hooks import Morph
from morphserve.integration.engine.runtime import EngineRuntime
from morphserve.integration.start import for_this_device, ladder_note, settings_of
from morphserve.integration.worker import check_weight_access

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = logging.getLogger("vllm.morphserve")

_RUNTIMES: dict[int, EngineRuntime] = {}  # id(vllm_config) |-> runtime, between planning and attach


def install() -> None:
    """Wrap the engine core. Re-entrant; engines without MorphServe pass straight through."""
    seams.wrap(seams.ENGINE_HANDLE, _initialize_kv_caches)
    seams.wrap(seams.KV_PLANNING, _get_kv_cache_configs)
    seams.wrap(seams.ENGINE_RPC, _collective_rpc)
    seams.put(seams.ENGINE_UTILITIES, "morphserve_status", _status)
    seams.put(seams.ENGINE_UTILITIES, "morphserve_reload", _reload)
    seams.put(seams.ENGINE_UTILITIES, "morphserve_order", _order)
    ending.install()


def _initialize_kv_caches(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def initialize_kv_caches(self: Any, vllm_config: VllmConfig) -> Any:
        config = settings_of(vllm_config)
        if config is not None:
            runtime = EngineRuntime(self, vllm_config, for_this_device(config, vllm_config), config)
            _RUNTIMES[id(vllm_config)] = runtime
            level, note = ladder_note(config, vllm_config)
            if note and runtime.index == 0:
                logger.log(level, "morphserve: %s.", note)
        return original(self, vllm_config)

    return initialize_kv_caches


def _get_kv_cache_configs(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def get_kv_cache_configs(
        vllm_config: VllmConfig, kv_cache_specs: list[dict[str, KVCacheSpec]], available_memory: list[int], *rest: Any
    ) -> list[KVCacheConfig]:
        def stock(*args: Any) -> Any:
            return original(*args, *rest)  # vLLM 0.33 hands over the cache groups as well

        runtime = _RUNTIMES.get(id(vllm_config))
        if runtime is None:
            return stock(vllm_config, kv_cache_specs, available_memory)
        return runtime.plan_kv(stock, kv_cache_specs, available_memory)

    return get_kv_cache_configs


def _collective_rpc(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(getattr(self, "scheduler", None), "morph"):
            check_weight_access(method)
        return original(self, method, *args, **kwargs)

    return collective_rpc


def attach(scheduler: Scheduler) -> Morph:
    """Tie the controller to the scheduler, from whose constructor this is called."""
    # vLLM configures the handlers of its own logger only; the packages that do not know vLLM log through it.
    logging.getLogger("morphserve").parent = logging.getLogger("vllm")
    return Morph(scheduler, _RUNTIMES.pop(id(scheduler.vllm_config)))


def _status(self: Any) -> dict[str, Any] | None:
    """Return the status page: a utility method of EngineCore, run between two steps on the engine's own thread."""
    morph = getattr(self.scheduler, "morph", None)
    return None if morph is None else morph.status()


def _reload(self: Any, cause: str, sent: str = "", is_rehearsal: bool = False) -> Future[dict[str, Any]] | None:
    """Read the settings anew: a utility method of EngineCore; vLLM answers when the thread that reads the file has."""
    morph = getattr(self.scheduler, "morph", None)
    return None if morph is None else morph.reload(cause, sent, is_rehearsal)


def _order(
    self: Any,
    action: Action,
    text: str,
    revisions: list[list[int]],
    is_rehearsal: bool,
    not_after_s: float,
    refusal: str = "",
) -> dict[str, Any] | None:
    """Take an operator's order, which names a revision of each engine that it is for: a utility of EngineCore."""
    morph = getattr(self.scheduler, "morph", None)
    revision = None if morph is None else dict(map(tuple, revisions)).get(morph.runtime.index)
    return None if revision is None else dict(morph.order(action, text, revision, is_rehearsal, not_after_s, refusal))
