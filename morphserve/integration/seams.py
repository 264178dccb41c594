"""Every place where MorphServe touches vLLM, one row each, checked before anything is installed.

All rows hold or the start fails with one message (never half installed). `wrap` replaces an attribute
by a function that calls the original; `uninstall` puts every original back.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from morphserve.errors import SeamError
from morphserve.version import SUPPORTED_VLLM

_MARK = "_morphserve_original"


@dataclass(frozen=True, slots=True)
class Seam:
    """One vLLM symbol we wrap, subclass or call."""

    name: str
    target: str  # "package.module:Class.attribute"
    params: tuple[str, ...]  # parameters we rely on, by name
    why: str  # delete the row when vLLM offers what it is for


@dataclass(frozen=True, slots=True)
class SeamResult:
    """Whether a row holds on the installed vLLM."""

    seam: Seam
    ok: bool
    detail: str


_SCHED = "vllm.v1.core.sched.scheduler:Scheduler"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_QUEUE = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue"

SEAMS: tuple[Seam, ...] = (
    Seam("cli_flags", "vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",),
         "adds --plugin and --morphserve-config; vLLM has no way to add a flag"),
    Seam("cli_values", "vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",),
         "puts the settings into additional_config"),
    Seam("engine_config", "vllm.engine.arg_utils:EngineArgs.create_engine_config", (),
         "sets scheduler_cls and worker_extension_cls, the two official class seams"),
    Seam("engine_handle", "vllm.v1.engine.core:EngineCore._initialize_kv_caches", ("vllm_config",),
         "the scheduler has no executor: keep the engine, ask the ranks what they can free"),
    Seam("kv_planning", "vllm.v1.engine.core:get_kv_cache_configs",
         ("vllm_config", "kv_cache_specs", "available_memory"),
         "the KV cache is laid out for the deepest level's blocks"),
    Seam("wake_up", "vllm.v1.engine:EngineCoreRequestType.WAKEUP", (),
         "an idle engine sleeps; restoring to level 0 needs a step"),
    Seam("step_hook", f"{_SCHED}.schedule", ("throttle_prefills",), "no callback between two engine steps"),
    Seam("step_result", f"{_SCHED}.update_from_output", ("scheduler_output", "model_runner_output"),
         "counts tokens by level"),
    Seam("arrival", f"{_SCHED}.add_request", ("request",), "arrival rate"),
    Seam("preemption", f"{_SCHED}._preempt_request", ("request", "timestamp"), "preemptions are a signal"),
    Seam("finish", f"{_SCHED}._free_blocks", ("request",), "blocks a request held when it ended"),
    Seam("has_work", f"{_SCHED}.has_requests", (), "lets an idle engine make the step that restores"),
    Seam("async_scheduler", "vllm.v1.core.sched.async_scheduler:AsyncScheduler", (),
         "the scheduler vLLM would have used is the one we subclass"),
    Seam("executor", "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc",
         ("method", "args", "non_block"), "commands travel in one queue with the steps"),
    Seam("pool_cache", f"{_POOL}.cache_full_blocks", ("request", "blocks"), "level a block was written at"),
    Seam("pool_evict", f"{_POOL}._maybe_evict_cached_block", ("block",), "tail blocks leave the prefix cache"),
    Seam("pool_alloc", f"{_POOL}.get_new_blocks", ("num_blocks",), "destinations of a migration"),
    Seam("queue_append", f"{_QUEUE}.append_n", ("blocks",), "growth"),
    Seam("queue_remove", f"{_QUEUE}.remove", ("block",), "fencing the tail"),
    Seam("block", "vllm.v1.core.kv_cache_utils:KVCacheBlock", ("block_id", "pool"), "growth makes new ones"),
    Seam("kv_alloc", "vllm.v1.worker.gpu_model_runner:allocate_kv_cache",
         ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
         "the backing becomes a reserved mapping of which only the published part is resident"),
    Seam("weights_loaded", "vllm.model_executor.model_loader.base_loader:process_weights_after_loading",
         ("model", "model_config", "target_device"),
         "the last moment at which the weights can be read: oneDNN swallows them"),
    Seam("linear_apply", "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply",
         ("layer", "x", "bias"), "the one indirection of a morphable linear"),
    Seam("linear_build", "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
         ("layer", "remove_weight"), "rebuilds the full-precision linear"),
    Seam("block_table", "vllm.v1.worker.block_table:MultiGroupBlockTable", (),
         "cached block ids are rewritten after a migration"),
)


def resolve(target: str) -> tuple[Any, str, Any]:
    """(owner, attribute name, value) of "module:a.b". Raises ImportError or AttributeError."""
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


def check_seam(seam: Seam) -> SeamResult:
    """Import the target and compare its parameters."""
    try:
        _, _, value = resolve(seam.target)
    except Exception as e:  # an import can fail in many ways; each of them means: not our vLLM
        return SeamResult(seam, False, f"{type(e).__name__}: {e}")
    value = getattr(value, _MARK, value)
    if not seam.params:
        return SeamResult(seam, True, "present")
    try:
        have = inspect.signature(value).parameters
    except (TypeError, ValueError) as e:
        return SeamResult(seam, False, f"no signature: {e}")
    missing = [p for p in seam.params if p not in have]
    if missing:
        return SeamResult(seam, False, f"parameters {missing} are gone; it has {list(have)}")
    return SeamResult(seam, True, "present, parameters match")


def check_version() -> SeamResult:
    """The installed vLLM is inside the supported range."""
    import vllm

    seam = Seam("version", "vllm:__version__", (), f"tested range {SUPPORTED_VLLM}")
    have = Version(Version(vllm.__version__).base_version)
    ok = SpecifierSet(SUPPORTED_VLLM).contains(have, prereleases=True)
    return SeamResult(seam, ok, f"installed {vllm.__version__}, supported {SUPPORTED_VLLM}")


def check_all() -> list[SeamResult]:
    """One result a row, the version first."""
    return [check_version(), *(check_seam(seam) for seam in SEAMS)]


def require_all() -> None:
    """Fail closed.

    Raises:
        SeamError: one message that names every row that does not hold.
    """
    broken = [r for r in check_all() if not r.ok]
    if broken:
        lines = "\n".join(f"  {r.seam.name} ({r.seam.target}): {r.detail}" for r in broken)
        raise SeamError(
            f"MorphServe cannot run on this vLLM: {len(broken)} of {len(SEAMS) + 1} seams do not hold:\n"
            f"{lines}\nInstall vllm{SUPPORTED_VLLM}, or start without --plugin morphserve."
        )


_installed: list[tuple[Any, str, Any]] = []


def wrap(target: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace `target` by `make(original)`, once. `make` returns the wrapper (or a descriptor of it)."""
    owner, name, current = resolve(target)
    if getattr(current, _MARK, None) is not None:
        return
    # A static or class method is kept as the descriptor it is, so that uninstall is exact.
    raw = vars(owner).get(name, current)
    replacement = make(current)
    setattr(getattr(replacement, "__func__", replacement), _MARK, current)
    setattr(owner, name, replacement)
    _installed.append((owner, name, raw))


def uninstall() -> None:
    """Put every original back, last one first."""
    while _installed:
        owner, name, raw = _installed.pop()
        setattr(owner, name, raw)
