"""What the NVIDIA path touches of vLLM beyond `seams.SEAMS`, in the same kind of rows.

Required on CUDA only, and written so that 0.32 and 0.33 both hold. `attributes` of a function are what it stores on
`self`: model runner V2 makes much of its state in `initialize_kv_cache`, not in its constructor.
"""

from __future__ import annotations

from morphserve.integration.seams import Seam

_OFFLOAD = "vllm.model_executor.offloader.base"
_V1 = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu.model_runner"
_RUNNER_V1 = f"{_V1}:GPUModelRunner"
_RUNNER_V2 = f"{_V2}:GPUModelRunner"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_TABLES = "vllm.v1.worker.gpu.block_table:BlockTables"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_OFFLOAD_CONFIG = "vllm.config.offload"
_OPS = "vllm._custom_ops"

CUDA_SEAMS: tuple[Seam, ...] = (
    Seam("cuda_platform", "vllm.platforms.interface:Platform.is_cuda", (), "which backing and which runner"),
    Seam("cuda_runner", "vllm.config:VllmConfig.use_v2_model_runner", (),
         "V2 is the default with Triton; V1 keeps block ids and graphs elsewhere"),
    # Layers: theirs are moved, and vLLM's own offloading would move them too.
    Seam("offload_config", "vllm.config:VllmConfig", (), "vLLM's own offloading moves the same layers: refused",
         ("offload_config",)),
    Seam("offload_choice", f"{_OFFLOAD_CONFIG}:OffloadConfig", (), "the same", ("offload_backend", "uva", "prefetch")),
    Seam("offload_uva", f"{_OFFLOAD_CONFIG}:UVAOffloadConfig", (), "the same", ("cpu_offload_gb",)),
    Seam("offload_prefetch", f"{_OFFLOAD_CONFIG}:PrefetchOffloadConfig", (), "the same", ("offload_group_size",)),
    Seam("linear_cuda", "vllm.model_executor.layers.linear:UnquantizedLinearMethod", (),
         "level 0 is the stock GEMM on layer.weight, read at every call: a Parameter whose data is our view will do",
         ("_gemm_impl", "apply")),
    Seam("linear_gemm", "vllm.model_executor.layers.utils:default_unquantized_gemm",
         ("layer", "x", "weight", "bias"),
         "F.linear; another choice (--linear-backend) is not proven"),
    # KV cache: one allocation, laid out for the deepest level.
    Seam("kv_alloc_v2", "vllm.v1.worker.gpu.attn_utils:allocate_kv_cache",
         ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
         "the backing becomes a reserved range of which only the published part is mapped"),
    # Block ids between two steps, model runner V2.
    Seam("blocks_v2", _TABLES, (),
         "a migration rewrites block_tables[group].gpu [max_num_reqs, max_num_blocks] int32, the only copy of ids that"
         " outlives a step: input_block_tables and slot_mappings are made from it at the head of each step, num_blocks"
         " holds counts. On the runner's stream: steps sent earlier gathered their ids before, and never write any."
         " Ids of blocks below a sliding window stay in it after they are freed: such models are refused",
         ("block_tables", "input_block_tables", "slot_mappings", "num_blocks", "append_block_ids",
          "apply_staged_writes")),
    Seam("blocks_v2_row", "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor", (),
         "ids that were staged and not yet written would escape the rewrite: there are none between two steps",
         ("gpu", "_staged_write_contents", "apply_write")),
    Seam("blocks_v2_sent", f"{_TABLES}.append_block_ids", ("req_index", "new_block_ids", "overwrite"),
         "where the ids of a step enter: those sent earlier are in before a rename, those sent later have new names"),
    Seam("runner_v2", _RUNNER_V2, (),
         "req_states holds no block ids; execute_model_state is None between two steps; what may keep ids is refused",
         ("req_states", "execute_model_state", "speculator", "pcp_manager", "ubatch_runner", "kv_connector",
          "cudagraph_manager", "execute_model", "sample_tokens", "main_stream")),
    Seam("runner_v1_inputs", _RUNNER_V1, (),
         "with async scheduling the copy of a step's block table may still read the pinned rows: wait before renaming",
         ("prepare_inputs_event", "synchronize_input_prep", "cudagraph_dispatcher")),
    # Graphs: one bank a level, switched between two steps.
    Seam("graphs", f"{_GRAPHS}:CudaGraphManager", (),
         "a bank is `graphs` and its `_candidates`: what is dispatched without a graph stops the worker",
         ("graphs", "pool", "_graphs_captured", "_candidates", "_capture_descs", "capture", "dispatch", "run_fullgraph",
          "release_graphs", "needs_capture", "use_breakable_cg", "breakable_cg_runner", "cudagraph_mode")),
    Seam("graphs_dispatch", f"{_GRAPHS}:CudaGraphManager.dispatch",
         ("num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"), "falls back where a bank has no graph"),
    Seam("graphs_replay", f"{_GRAPHS}:CudaGraphManager.run_fullgraph", ("desc",), "a bank's level must be the layers'"),
    Seam("graphs_capture_v2", f"{_RUNNER_V2}.capture_model", ("profile_only",),
         "once a level; with profile_only the workspace stays unlocked, so only the last bank is captured without"),
    Seam("graphs_capture_v1", f"{_RUNNER_V1}.capture_model", (), "once a level"),
    Seam("graphs_memory_v2", f"{_RUNNER_V2}.profile_cudagraph_memory", (), "counts one bank: ours are more"),
    Seam("graphs_memory_v1", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.profile_cudagraph_memory", (),
         "counts one bank: ours are more"),
    Seam("refuse_ubatch", "vllm.config:ParallelConfig.use_ubatching", (), "microbatches keep graphs of their own"),
    Seam("refuse_partition", "vllm.config:CompilationConfig", (), "gives up the memory of earlier captures",
         ("use_inductor_graph_partition",)),
    Seam("refuse_transfer", "vllm.config:VllmConfig", (), "weights sent in later would be lost with a restore",
         ("weight_transfer_config", "attention_config")),
    Seam("stream", "vllm.utils.torch_utils:current_stream", (), "the one that forward passes are launched on"),
    Seam("piecewise", "vllm.compilation.cuda_graph:CUDAGraphWrapper", (),
         "a bank holds the entries of each piece; V1 has its full graphs here too",
         ("_all_instances", "concrete_cudagraph_entries", "runtime_mode", "graph_pool", "clear_graphs")),
    Seam("breakable", "vllm.compilation.breakable_cudagraph:BreakableCUDAGraphWrapper", (),
         "the same, without torch.compile", ("_all_instances", "entries", "graph_pool", "clear_graphs")),
    Seam("dispatcher_v1", "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher", (),
         "V1 replays by these keys; what a bank lacks must not be one of them",
         ("cudagraph_keys", "keys_initialized", "cudagraph_mode", "dispatch", "get_capture_descs")),
    # Memory and the order of the start.
    Seam("worker_memory", f"{_WORKER}.determine_available_memory", (),
         "counts what the device has less of (our arenas, once mapped) and torch's transient peak; the banks come off",
         ("available_kv_cache_memory_bytes",)),
    Seam("worker_fixed", "vllm.config:CacheConfig", (), "a KV size that is given replaces the measurement",
         ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")),
    Seam("worker_kv", f"{_WORKER}.initialize_from_config", ("kv_cache_config",), "the KV cache is made here"),
    Seam("worker_warm", f"{_WORKER}.compile_or_warm_up_model", (), "compiles, warms up, captures: banks come after"),
    Seam("worker_cuda", _WORKER, (), "which runner it made", ("use_v2_model_runner", "cache_config", "model_runner")),
    Seam("executor_uni", "vllm.v1.executor.uniproc_executor:UniProcExecutor.collective_rpc",
         ("method", "args", "non_block"),
         "a single rank runs commands at once, in the engine core's thread: nothing in them may wait for the device"),
)

# What the operators that `quant_layers` calls by place take, as vLLM's own wrappers tell it. Each kernel also proves
# itself at start; these rows say why when it does not.
CUDA_KERNEL_SEAMS: tuple[Seam, ...] = (
    Seam("marlin_gemm", f"{_OPS}:marlin_gemm",
         ("a", "c", "b_q_weight", "b_bias", "b_scales", "a_scales", "global_scale", "b_zeros", "workspace", "b_q_type",
          "size_m", "size_n", "size_k", "use_atomic_add", "use_fp32_reduce", "is_zp_float"), "runs W4A16 and W8A16"),
    Seam("machete_prepack", f"{_OPS}:machete_prepack_B", ("b_q_weight", "a_type", "b_type", "group_scales_type"),
         "lays W4A16 out on Hopper"),
    Seam("machete_gemm", f"{_OPS}:machete_mm",
         ("a", "b_q", "b_type", "out_type", "b_group_scales", "b_group_zeros", "b_group_size", "b_channel_scales",
          "a_token_scales", "schedule"), "runs W4A16 on Hopper"),
    Seam("fp8_gemm", f"{_OPS}:cutlass_scaled_mm", ("a", "b", "scale_a", "scale_b", "out_dtype", "bias"), "runs fp8"),
    Seam("scalar_types", "vllm.scalar_type:scalar_types", (), "what packed integers mean", ("uint4b8", "uint8b128")),
)
