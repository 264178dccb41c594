"""What the NVIDIA path touches of vLLM beyond `seams.SEAMS`, in the same kind of rows.

Required on CUDA only, and written so that 0.32 and 0.33 both hold. `attributes` of a function are what it stores on
`self`: model runner V2 makes much of its state in `initialize_kv_cache`, not in its constructor.
"""

from __future__ import annotations

from morphserve.integration.seams.rows import Seam

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
    Seam("cuda_platform", "vllm.platforms.interface:Platform", (), "which backing, and what an empty ladder means",
         ("has_device_capability", "device_type", "device_name", "get_device_name", "is_cpu")),
    Seam("refuse_cumem", "vllm.config:ModelConfig", (), "an allocator that moves the same memory: refused",
         ("enable_cumem_allocator",)),
    # Layers: theirs are moved, and vLLM's own offloading would move them too.
    Seam("offload_config", "vllm.config:VllmConfig", (), "vLLM's own offloading moves the same layers: refused",
         ("offload_config",)),
    Seam("offload_choice", f"{_OFFLOAD_CONFIG}:OffloadConfig", (), "the same", ("offload_backend", "uva", "prefetch")),
    Seam("offload_uva", f"{_OFFLOAD_CONFIG}:UVAOffloadConfig", (), "the same", ("cpu_offload_gb",)),
    Seam("offload_prefetch", f"{_OFFLOAD_CONFIG}:PrefetchOffloadConfig", (), "the same", ("offload_group_size",)),
    Seam("linear_cuda", "vllm.model_executor.layers.linear:UnquantizedLinearMethod", (),
         "level 0 is the stock GEMM on layer.weight, read at every call: a Parameter whose data is our view will do",
         ("apply",)),
    # KV cache: one allocation, laid out for the deepest level.
    KV_ALLOC_V2 := Seam("kv_alloc_v2", "vllm.v1.worker.gpu.attn_utils:allocate_kv_cache",
         ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
         "the backing becomes a reserved range of which only the published part is mapped"),
    # Block ids between two steps, model runner V2.
    Seam("blocks_v2", _TABLES, (),
         "a migration rewrites block_tables[group].gpu [max_num_reqs, max_num_blocks] int32, the only copy of ids that"
         " outlives a step. On the runner's stream: steps sent earlier gathered their ids before, and never write any."
         " Ids of blocks below a sliding window stay in it after they are freed: such models are refused. What graphs"
         " read keeps ids of earlier requests behind a row's end: those of blocks that go are cleared",
         ("block_tables", "input_block_tables")),
    Seam("blocks_v2_row", "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor", (),
         "ids that were staged and not yet written would escape the rewrite: there are none between two steps",
         ("gpu",)),
    Seam("runner_v2", _RUNNER_V2, (), "where its graphs are", ("cudagraph_manager",)),
    Seam("runner_v1", _RUNNER_V1, (), "where its graphs are", ("cudagraph_dispatcher",)),
    # Graphs: one graph set a level, switched between two steps.
    Seam("graphs", f"{_GRAPHS}:CudaGraphManager", (),
         "a graph set is `graphs` and its `_candidates`: what is dispatched without a graph stops the worker",
         ("graphs", "_candidates")),
    Seam("graphs_descs", f"{_GRAPHS}:CudaGraphManager", (),
         "mode |-> descriptors that it captures: fewer for the later graph sets", ("_capture_descs",)),
    Seam("graphs_breakable", f"{_GRAPHS}:CudaGraphManager.init_breakable_cg_runner", ("model",),
         "its wrapper must be there before graph sets are made"),
    Seam("graphs_is_breakable", f"{_GRAPHS}:CudaGraphManager", (), "whether it captures without torch.compile",
         ("use_breakable_cg",)),
    CAPTURE_V2 := Seam("graphs_capture_v2", f"{_RUNNER_V2}.capture_model", ("profile_only",),
         "once a level; with profile_only it is vLLM's own estimate"),
    CAPTURE_V1 := Seam("graphs_capture_v1", f"{_RUNNER_V1}.capture_model", (), "once a level"),
    GRAPH_MEMORY_V2 := Seam("graphs_memory_v2", f"{_RUNNER_V2}.profile_cudagraph_memory", (),
         "counts one graph set: ours are more"),
    GRAPH_MEMORY_V1 := Seam("graphs_memory_v1", f"{_RUNNER_V1}.profile_cudagraph_memory", (),
         "counts one graph set: ours are more"),
    Seam("graphs_workspace", "vllm.v1.worker.workspace:WorkspaceManager", (),
         "locked behind each capture, and no set may move it under the graphs of another", ("_current_workspaces",)),
    Seam("graphs_unlock", "vllm.v1.worker.workspace:unlock_workspace", (), "before the capture of a later graph set"),
    Seam("graphs_scratch", "vllm.v1.worker.workspace:current_workspace_manager", (), "where it lies"),
    Seam("graphs_has_scratch", "vllm.v1.worker.workspace:is_workspace_manager_initialized", (), "whether there is one"),
    Seam("graphs_stream", "vllm.distributed.parallel_state:GraphCaptureContext", ("stream",),
         "made by this name for each capture, with a stream of its own: all graph sets are to share the first's",
         ("stream",)),
    Seam("graphs_mode", "vllm.config:CUDAGraphMode", (), "how many graphs a graph set has at most",
         ("NONE", "mixed_mode", "separate_routine")),
    Seam("graphs_sizes", "vllm.config:CompilationConfig", (), "the same",
         ("cudagraph_mode", "cudagraph_capture_sizes")),
    Seam("graphs_buffers", "vllm.config:ParallelConfig", (), "custom all-reduce has room for so many graphs",
         ("tensor_parallel_size", "disable_custom_all_reduce")),
    Seam("graphs_stages", "vllm.distributed.utils:get_pp_indices", ("num_hidden_layers", "pp_rank", "pp_size"),
         "which layers a stage has, and so how many graph sets"),
    Seam("refuse_ubatch", "vllm.config:ParallelConfig.use_ubatching", (), "microbatches keep graphs of their own"),
    Seam("refuse_partition", "vllm.config:CompilationConfig", (), "gives up the memory of earlier captures",
         ("use_inductor_graph_partition",)),
    Seam("refuse_attention", "vllm.config:VllmConfig", (), "where HiSparse is asked for", ("attention_config",)),
    Seam("refuse_hisparse", "vllm.config:AttentionConfig", (), "allocates a KV cache of its own",
         ("hisparse_config",)),
    Seam("stream", "vllm.utils.torch_utils:current_stream", (), "the one that forward passes are launched on"),
    Seam("piecewise", "vllm.compilation.cuda_graph:CUDAGraphWrapper", (),
         "a graph set holds the entries of each piece; V1 has its full graphs here too",
         ("_all_instances", "concrete_cudagraph_entries", "runtime_mode")),
    Seam("breakable", "vllm.compilation.breakable_cudagraph:BreakableCUDAGraphWrapper", (),
         "the same, without torch.compile", ("_all_instances", "entries")),
    Seam("dispatcher_v1", "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher", (),
         "V1 replays by these keys; what a graph set lacks must not be one of them",
         ("cudagraph_keys",)),
    # Memory and the order of the start.
    WORKER_MEMORY := Seam("worker_memory", f"{_WORKER}.determine_available_memory", (),
         "counts what the device has less of (our arenas, once mapped), torch's transient peak; graph sets come off"),
    Seam("worker_fixed", "vllm.config:CacheConfig", (), "a KV size that is given replaces the measurement",
         ("kv_cache_memory_bytes", "num_gpu_blocks_override")),
    WORKER_WARM := Seam("worker_warm", f"{_WORKER}.compile_or_warm_up_model", (),
         "compiles, warms up, captures: graph sets come after"),
    Seam("worker_cuda", _WORKER, (), "the runner it made, and the KV size it was given",
         ("cache_config", "model_runner")),
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
