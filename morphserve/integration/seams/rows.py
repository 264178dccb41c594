"""Every place where MorphServe touches vLLM, one row each, checked before anything is installed.

All rows hold or the start fails with one message (never half installed). `wrap` replaces an attribute
by a function that calls the original; `uninstall` puts every original back.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from morphserve.errors import SeamError
from morphserve.version import SUPPORTED_VLLM, UNPROVEN_CUDA, UNPROVEN_VLLM

_MARK = "_morphserve_original"
_MAKER = "_morphserve_maker"


@dataclass(frozen=True, slots=True)
class Seam:
    """One vLLM symbol we wrap, subclass or call."""

    name: str
    target: str  # "package.module:Class.attribute"
    params: tuple[str, ...]  # parameters we rely on, by name
    why: str  # delete the row when vLLM offers what it is for
    # Of the instances of a class: fields, methods, what constructors set. Of a function: what it stores on an object.
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SeamResult:
    """Whether a row holds on the installed vLLM."""

    seam: Seam
    ok: bool
    detail: str


_SCHED = "vllm.v1.core.sched.scheduler:Scheduler"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_QUEUE = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue"
_SPEC = "vllm.v1.kv_cache_interface"
_OUTPUT = "vllm.v1.core.sched.output"
_INPUT = "vllm.v1.worker.gpu_input_batch"
_LINEAR = "vllm.model_executor.layers.linear"
_CT = "vllm.model_executor.layers.quantization.compressed_tensors"

SEAMS: tuple[Seam, ...] = (
    Seam("cli_flags", "vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",),
         "adds --plugin and --morphserve-config; vLLM has no way to add a flag"),
    Seam("cli_values", "vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",),
         "puts the settings into additional_config"),
    Seam("engine_config", "vllm.engine.arg_utils:EngineArgs.create_engine_config", (),
         "sets scheduler_cls and worker_extension_cls, the two official class seams"),
    Seam("config", "vllm.config:VllmConfig", (), "what was asked for, and what we must refuse",
         ("additional_config", "model_config", "cache_config", "parallel_config", "scheduler_config", "lora_config",
          "kv_transfer_config", "speculative_config", "compilation_config")),
    Seam("config_model", "vllm.config:ModelConfig", (), "dense decoders only",
         ("model", "runner_type", "is_hybrid", "is_attention_free", "is_moe", "use_mla", "is_encoder_decoder",
          "is_multimodal_model", "quantization", "enable_sleep_mode", "max_model_len",
          "get_total_num_hidden_layers")),
    Seam("config_base", "vllm.config:ModelConfig", (), "an imported checkpoint must be of the model served",
         ("hf_text_config", "tokenizer", "skip_tokenizer_init")),
    Seam("offline", "vllm:LLM", ("model",), "measuring levels in the kernels that serve them",
         ("llm_engine", "generate", "get_tokenizer")),
    Seam("offline_engine", "vllm.v1.engine.llm_engine:LLMEngine", (), "decode steps, one by one",
         ("engine_core", "add_request", "abort_request", "step", "has_unfinished_requests")),
    Seam("offline_sampling", "vllm:SamplingParams", ("temperature", "max_tokens", "prompt_logprobs", "ignore_eos"),
         "greedy, with the logits of the prompt"),
    Seam("config_cache", "vllm.config:CacheConfig", (), "number and size of blocks",
         ("block_size", "num_gpu_blocks", "num_gpu_blocks_override")),
    Seam("config_parallel", "vllm.config:ParallelConfig", (), "ranks of one host; which replica this is; API servers",
         ("distributed_executor_backend", "world_size", "data_parallel_size", "data_parallel_backend",
          "data_parallel_index", "pipeline_parallel_size", "enable_expert_parallel",
          "decode_context_parallel_size", "prefill_context_parallel_size", "_api_process_count")),
    Seam("config_scheduler", "vllm.config:SchedulerConfig", (), "watermark; which scheduler is subclassed",
         ("async_scheduling", "watermark")),
    Seam("door_limit", "vllm.config:SchedulerConfig", (), "asked at every request: how a policy sheds",
         ("max_num_queued_tokens",)),
    Seam("config_compile", "vllm.config:CompilationConfig", (), "eager or compiled", ("mode",)),
    Seam("platform", "vllm.platforms:current_platform.is_cpu", (), "CPU only"),
    Seam("engine_handle", "vllm.v1.engine.core:EngineCore._initialize_kv_caches", ("vllm_config",),
         "the scheduler has no executor: keep the engine, ask the ranks what they can free"),
    Seam("kv_planning", "vllm.v1.engine.core:get_kv_cache_configs",
         ("vllm_config", "kv_cache_specs", "available_memory"),
         "the KV cache is laid out for the deepest level's blocks"),
    Seam("worker_start", "vllm.v1.executor.multiproc_executor:WorkerProc.wait_for_ready", ("unready_proc_handles",),
         "says that a worker failed, not why"),
    Seam("engine_start", "vllm.v1.engine.utils:wait_for_engine_startup", (), "says that the engine failed, not why"),
    Seam("worker_end", "vllm.v1.executor.multiproc_executor:WorkerProc.worker_main", (),
         "logs the exception that ends a worker; found by the function's name in the log record"),
    Seam("engine_end", "vllm.v1.engine.core:EngineCoreProc.run_engine_core", (),
         "logs the exception that ends the engine; found by the function's name in the log record"),
    Seam("wake_up", "vllm.v1.engine:EngineCoreRequestType.WAKEUP", (),
         "an idle engine sleeps; restoring to level 0 needs a step"),
    Seam("step_hook", f"{_SCHED}.schedule", ("throttle_prefills",), "no callback between two engine steps"),
    Seam("step_result", f"{_SCHED}.update_from_output", ("scheduler_output", "model_runner_output"),
         "counts tokens by level"),
    Seam("arrival", f"{_SCHED}.add_request", ("request",), "arrival rate"),
    Seam("preemption", f"{_SCHED}._preempt_request", ("request", "timestamp", "drop_stale_output"),
         "preemptions are a signal, and the last resort of a shrink"),
    Seam("finish", f"{_SCHED}._free_blocks", ("request",), "blocks a request held when it ended"),
    Seam("has_work", f"{_SCHED}.has_requests", (), "lets an idle engine make the step that restores"),
    Seam("async_scheduler", "vllm.v1.core.sched.async_scheduler:AsyncScheduler", (),
         "the scheduler vLLM would have used is the one we subclass"),
    Seam("executor", "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc",
         ("method", "args", "non_block"), "commands travel in one queue with the steps"),
    Seam("sched_state", _SCHED, (), "no port for load, pause and sizes",
         ("vllm_config", "cache_config", "scheduler_config", "kv_cache_config", "kv_cache_manager", "requests",
          "waiting", "running", "policy", "pause_state", "get_request_counts", "has_unfinished_requests", "shutdown",
          "prev_step_scheduled_req_ids")),
    Seam("sched_pause", "vllm.v1.core.sched.interface:PauseState.UNPAUSED", (), "a paused engine gets no steps"),
    Seam("sched_queue", "vllm.v1.core.sched.request_queue:RequestQueue.peek_request", (), "age of the oldest"),
    Seam("sched_output", f"{_OUTPUT}:SchedulerOutput", (), "who starts in this step, and what runs",
         ("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens")),
    Seam("sched_resumed", f"{_OUTPUT}:CachedRequestData", (), "who runs again after a preemption",
         ("resumed_req_ids",)),
    Seam("sched_new", f"{_OUTPUT}:NewRequestData", (), "who starts in this step", ("req_id",)),
    Seam("model_output", "vllm.v1.outputs:ModelRunnerOutput", (), "tokens by level", ("sampled_token_ids",)),
    Seam("request", "vllm.v1.request:Request", (), "latencies, and the level a request's KV was written at",
         ("request_id", "arrival_time", "num_preemptions", "num_computed_tokens", "num_output_tokens",
          "is_finished", "sampling_params", "priority", "num_tokens")),
    Seam("request_args", "vllm.sampling_params:SamplingParams", (), "a request asks for a receipt", ("extra_args",)),
    Seam("step_size", "vllm.config.scheduler:SchedulerConfig", (), "what a worst-case forward pass is",
         ("max_num_batched_tokens", "max_num_seqs")),
    Seam("engine_core", "vllm.v1.engine.core:EngineCoreProc", (), "wake-ups, commands and the status page",
         ("input_queue", "model_executor", "scheduler", "step_fn")),
    Seam("utility_call", "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("method",),
         "status and metrics are asked for between two steps"),
    Seam("kv_manager", "vllm.v1.core.kv_cache_manager:KVCacheManager", (), "sizes follow the published blocks",
         ("block_pool", "max_model_len", "watermark_blocks", "get_block_ids")),
    Seam("kv_config", f"{_SPEC}:KVCacheConfig", (), "how many blocks, laid out how",
         ("num_blocks", "kv_cache_tensors", "kv_cache_groups")),
    Seam("kv_tensor", f"{_SPEC}:KVCacheTensor", (), "where a block's bytes lie",
         ("size", "layers", "layer_stride", "block_stride", "offset")),
    Seam("kv_spec", f"{_SPEC}:KVCacheGroupSpec", (), "of which kind the blocks are", ("kv_cache_spec",)),
    Seam("kv_full", f"{_SPEC}:FullAttentionSpec", (), "blocks that can be moved", ("block_size",)),
    Seam("kv_sliding", f"{_SPEC}:SlidingWindowSpec", (), "the same, and how many one request needs",
         ("max_memory_usage_bytes", "page_size_bytes")),
    Seam("kv_uniform", f"{_SPEC}:UniformTypeKVCacheSpecs", (), "of which kind the blocks are", ("kv_cache_specs",)),
    Seam("pool_state", _POOL, (), "vLLM's pool has one size for life",
         ("blocks", "num_gpu_blocks", "free_block_queue", "cached_block_hash_to_block",
          "cached_block_hashes_by_block", "metrics_collector", "_reuse_watchers")),
    Seam("pool_count", f"{_POOL}.get_num_free_blocks", (), "room for a migration; blocks in use"),
    Seam("pool_cache", f"{_POOL}.cache_full_blocks",
         ("request", "blocks", "num_cached_blocks", "num_full_blocks"), "level a block was written at"),
    Seam("pool_cache_partial", f"{_POOL}.cache_partial_block", ("request", "block"),
         "level a block was written at"),
    Seam("pool_evict", f"{_POOL}._maybe_evict_cached_block", ("block",), "tail blocks leave the prefix cache"),
    Seam("pool_notify", f"{_POOL}._notify_reuse", ("blocks",), "watchers of a tail block hear that it goes"),
    Seam("pool_free", f"{_POOL}.free_blocks", ("ordered_blocks",), "a tail block is fenced when it is freed"),
    Seam("pool_lookup", "vllm.v1.core.block_pool:BlockHashToBlockMap", (),
         "a cached block changes its id, and is not the only one with its hash",
         ("pop", "insert", "_cache")),
    Seam("pool_ages", "vllm.v1.core.kv_cache_metrics:KVCacheMetricsCollector", (),
         "a sampled block changes its id", ("block_metrics",)),
    Seam("queue_walk", f"{_QUEUE}.iter_blocks_after", ("cursor",), "growth: behind the empty blocks"),
    Seam("queue_take", f"{_QUEUE}.popleft_n", ("n",), "growth: behind the empty blocks"),
    Seam("queue_put", f"{_QUEUE}.prepend_n", ("blocks",), "growth: ahead of the cached blocks"),
    Seam("queue_remove", f"{_QUEUE}.remove", ("block",), "fencing the tail"),
    Seam("block", "vllm.v1.core.kv_cache_utils:KVCacheBlock", ("block_id", "pool"), "growth makes new ones",
         ("block_id", "ref_cnt", "block_hash")),
    Seam("pool_hit", f"{_POOL}.get_cached_block", ("block_hash", "kv_cache_group_ids"),
         "which cached blocks a request may reuse"),
    Seam("manager_hit", "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks", ("request",),
         "whose lookup it is"),
    Seam("manager_slots", "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots", ("request",),
         "which level a request's next tokens are written at"),
    Seam("output", "vllm.v1.engine:EngineCoreOutput", (), "carries a receipt to the client",
         ("request_id", "finish_reason", "kv_transfer_params")),
    Seam("worst_forward", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.profile_run", (),
         "the memory that growth must leave"),
    Seam("worst_forward_context", "vllm.v1.worker.cpu_model_runner:_set_global_compilation_settings", ("config",),
         "as vLLM runs it"),
    Seam("kv_alloc", "vllm.v1.worker.gpu_model_runner:allocate_kv_cache",
         ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
         "the backing becomes a reserved mapping of which only the published part is resident"),
    Seam("weights_loaded", "vllm.model_executor.model_loader.base_loader:process_weights_after_loading",
         ("model", "model_config", "target_device"),
         "the last moment at which the weights can be read: oneDNN swallows them"),
    Seam("linear", f"{_LINEAR}:LinearBase", (), "what a morphable linear is",
         ("quant_method", "prefix", "output_size", "params_dtype", "skip_bias_add", "tp_rank")),
    Seam("linear_column", f"{_LINEAR}:ColumnParallelLinear", (), "this rank's slice",
         ("input_size_per_partition", "output_size_per_partition")),
    Seam("linear_row", f"{_LINEAR}:RowParallelLinear", (), "this rank's slice; who adds the bias",
         ("input_size_per_partition", "output_size_per_partition", "input_is_parallel")),
    Seam("linear_apply", "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply",
         ("layer", "x", "bias"), "the one indirection of a morphable linear"),
    Seam("linear_build", "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
         ("layer", "remove_weight"), "rebuilds a linear that is not quantized"),
    Seam("linear_scaled", f"{_CT}.compressed_tensors:CompressedTensorsLinearMethod", (),
         "a quantized linear at level 0: packed again, and run, on a module of our own",
         ("process_weights_after_loading", "apply")),
    Seam("linear_int8", f"{_CT}.schemes:CompressedTensorsW8A8Int8", (), "whose parameters say all",
         ("strategy", "is_static_input_scheme", "input_symmetric")),
    Seam("linear_fp8", f"{_CT}.schemes:CompressedTensorsW8A8Fp8", (), "whose parameters say all", ("strategy",)),
    Seam("linear_kernel", "vllm.model_executor.kernels.linear:ScaledMMLinearKernel", (),
         "what a scheme keeps packed weights in"),
    Seam("linear_fused", "vllm.model_executor.layers.fusion.quant_activation:get_input_quant_key", ("layer",),
         "a linear that is handed quantized activations is refused"),
    Seam("build_dtype", "vllm.utils.torch_utils:set_default_torch_dtype", ("dtype",),
         "kernels are built under the dtype that vLLM loads under"),
    Seam("loaded_config", "vllm.config:get_current_vllm_config_or_none", (), "is this model one of ours"),
    Seam("loaded_rank", "vllm.distributed:get_world_group", (), "which rank's slice this is"),
    Seam("loaded_stage", "vllm.distributed:get_pp_group", (), "a profile is known by the norms of all stages"),
    Seam("compiled", "vllm.config:CompilationMode.NONE", (), "which of the two indirections a linear gets"),
    Seam("worker", "vllm.v1.worker.worker_base:WorkerBase", (), "commands reach the rank's runner",
         ("rank", "model_runner", "vllm_config")),
    Seam("runner", "vllm.v1.worker.gpu_model_runner:GPUModelRunner", (),
         "cached block ids are rewritten after a migration", ("requests", "input_batch")),
    Seam("runner_request", f"{_INPUT}:CachedRequestState", (), "the same", ("block_ids",)),
    Seam("runner_batch", f"{_INPUT}:InputBatch", (), "the same", ("block_table",)),
    Seam("block_table", "vllm.v1.worker.block_table:MultiGroupBlockTable", (), "the same", ("block_tables",)),
    Seam("block_table_rows", "vllm.v1.worker.block_table:BlockTable", (), "the same", ("block_table",)),
    Seam("block_table_host", "vllm.v1.utils:CpuGpuBuffer", (), "the same", ("np",)),
)


def resolve(target: str) -> tuple[Any, str, Any]:
    """(owner, attribute name, value) of "module:a.b". Raises ImportError or AttributeError."""
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


def instance_attributes(value: Any) -> set[str]:
    """What an instance of a class has: everything in its classes, and what their constructors store; of a function,
    what it stores: some state is made later than in a constructor."""
    if not inspect.isclass(value):
        return _stored(value)
    found: set[str] = set()
    for cls in inspect.getmro(value):
        found |= set(vars(cls)) | set(inspect.get_annotations(cls))
        for name in ("__init__", "__post_init__"):
            found |= _stored(vars(cls).get(name))
    return found


def _stored(function: Any) -> set[str]:
    """Names of the attributes that a function stores, on whatever object; of anything else none."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"} if code else set()


def check_seam(seam: Seam) -> SeamResult:
    """Import the target and compare its parameters."""
    try:
        _, _, value = resolve(seam.target)
    except Exception as e:  # an import can fail in many ways; each of them means: not our vLLM
        return SeamResult(seam, False, f"{type(e).__name__}: {e}")
    while getattr(value, _MARK, None) is not None:
        value = getattr(value, _MARK)
    if gone := sorted(set(seam.attributes) - instance_attributes(value)):
        return SeamResult(seam, False, f"instances have no {gone}")
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

    supported = UNPROVEN_VLLM if os.environ.get(UNPROVEN_CUDA) == "1" else SUPPORTED_VLLM
    seam = Seam("version", "vllm:__version__", (), f"tested range {SUPPORTED_VLLM}")
    have = Version(Version(vllm.__version__).base_version)
    ok = SpecifierSet(supported).contains(have, prereleases=True)
    return SeamResult(seam, ok, f"installed {vllm.__version__}, supported {supported}")


def check_all() -> list[SeamResult]:
    """One result a row, the version first."""
    return [check_version(), *(check_seam(seam) for seam in SEAMS)]


def require_all(more: Sequence[Seam] = ()) -> None:
    """Fail closed.

    Args:
        more: rows of the device that vLLM has found.

    Raises:
        SeamError: one message that names every row that does not hold.
    """
    broken = [r for r in (*check_all(), *map(check_seam, more)) if not r.ok]
    if broken:
        lines = "\n".join(f"  {r.seam.name} ({r.seam.target}): {r.detail}" for r in broken)
        raise SeamError(
            f"MorphServe cannot run on this vLLM: {len(broken)} of {len(SEAMS) + len(more) + 1} seams do not hold:\n"
            f"{lines}\nInstall vllm{SUPPORTED_VLLM}, or start without --plugin morphserve."
        )


_installed: list[tuple[Any, str, Any]] = []


def wrap(target: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace `target` by `make(original)`, once for each `make`. It returns the wrapper (or a descriptor of it).

    Host and device workers wrap the same functions; where both modules are loaded, each sees to its own device.
    """
    owner, name, current = resolve(target)
    wrapper = current
    while getattr(wrapper, _MARK, None) is not None:
        if getattr(wrapper, _MAKER) is make:
            return
        wrapper = getattr(wrapper, _MARK)
    # A static or class method is kept as the descriptor it is, so that uninstall is exact.
    raw = vars(owner).get(name, current)
    replacement = make(current)
    function = getattr(replacement, "__func__", replacement)
    setattr(function, _MARK, current)
    setattr(function, _MAKER, make)
    setattr(owner, name, replacement)
    _installed.append((owner, name, raw))


def uninstall() -> None:
    """Put every original back, last one first."""
    while _installed:
        owner, name, raw = _installed.pop()
        setattr(owner, name, raw)
