"""What a worker on a device can do for the engine. Everything that takes pages goes on beside its forward passes.

vLLM imports this module because `worker_extension_cls` names the class below, before the model is loaded; importing it
installs the seams, as in morphserve/integration/worker/worker.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from kv_resize import KVResizeError
from morphserve.control import Plan, Reply
from morphserve.errors import ConfigError
from morphserve.integration import seams
from morphserve.integration.describe import RankDescription
from morphserve.integration.start import check_fixed_kv, for_this_device, read_settings
from morphserve.integration.worker.commands import Commands, Figures, KVUnknown
from morphserve.integration.worker.cuda.graphs import LevelGraphs
from morphserve.integration.worker.cuda.kv import DeviceKV
from morphserve.integration.worker.cuda.layers import DeviceLayers
from morphserve.integration.worker.cuda.refusals import refuse_weight_access
from morphserve.integration.worker.cuda.workspace import BankWorkspace
from morphserve.residence import DeviceMemory, DeviceRank, DeviceSwapper, open_memory, wants_device


def _forward_stream() -> Any:
    """Ask as vLLM asks, which then keeps to the stream that it gets."""
    from vllm.utils.torch_utils import current_stream

    return current_stream()


class _Rank:
    """This process's rank. Filled while vLLM loads; a process holds one model."""

    def __init__(self) -> None:
        self.memory: DeviceMemory | None = None
        self.layers: DeviceLayers | None = None
        self.base_num_blocks: int | None = None  # None until the engine has planned: caches before are for profiling
        self.level_formats: tuple[tuple[str, ...], ...] = ()
        self.graphs: LevelGraphs | None = None
        self.kv: DeviceKV | None = None
        self.rank: DeviceRank | None = None
        self.commands = Commands()

    @property
    def swapper(self) -> DeviceSwapper:
        assert self.layers is not None and self.layers.swapper is not None
        return self.layers.swapper


_RANK = _Rank()


def install_worker_seams() -> None:
    """Re-entrant; engines of this process without MorphServe pass straight through."""
    seams.wrap("vllm.model_executor.model_loader.base_loader:process_weights_after_loading", _weights_loaded)
    seams.wrap("vllm.v1.worker.gpu_model_runner:allocate_kv_cache", _allocate_kv_cache)
    seams.wrap("vllm.v1.worker.gpu.attn_utils:allocate_kv_cache", _allocate_kv_cache)
    seams.wrap("vllm.v1.worker.gpu_model_runner:GPUModelRunner.capture_model", _capture_model)
    seams.wrap("vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model", _capture_model)
    seams.wrap("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", _warm_up)
    seams.wrap("vllm.v1.worker.gpu_worker:Worker.determine_available_memory", _available_memory)
    refuse_weight_access(_has_layers)
    seams.wrap("vllm.v1.worker.gpu.model_runner:GPUModelRunner.profile_cudagraph_memory", _graph_memory)
    seams.wrap("vllm.v1.worker.gpu_model_runner:GPUModelRunner.profile_cudagraph_memory", _graph_memory)


def _weights_loaded(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def process_weights_after_loading(model: Any, model_config: Any, target_device: Any) -> Any:
        from vllm.config import get_current_vllm_config_or_none
        from vllm.distributed import get_world_group

        vllm_config = get_current_vllm_config_or_none()
        config = read_settings(getattr(vllm_config, "additional_config", None))
        fresh = _Rank()
        if _RANK.memory is not None:  # an earlier engine of this process: its pages are wanted
            old, _RANK.memory = _RANK.memory, None
            old.close()
        if config is None or not wants_device(target_device.type):
            vars(_RANK).update(vars(fresh))  # what we wrap lets this engine through
            return original(model, model_config, target_device)
        try:
            fresh.memory = open_memory(target_device, _forward_stream)
            config = for_this_device(config, vllm_config)
            fresh.layers = DeviceLayers(config, vllm_config, get_world_group().rank, fresh.memory)
            fresh.layers.capture(model)
            result = original(model, model_config, target_device)
            fresh.layers.install()
        except KVResizeError as e:
            raise ConfigError(f"no pages for the decoder layers: {e}") from e
        vars(_RANK).update(vars(fresh))  # of an earlier engine of this process nothing stays
        return result

    return process_weights_after_loading


def _allocate_kv_cache(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def allocate_kv_cache(kv_cache_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if _RANK.memory is None or _RANK.base_num_blocks is None or not wants_device(device.type):
            return original(kv_cache_config, device, *args, **kwargs)
        kv = DeviceKV(kv_cache_config, _RANK.memory, _RANK.base_num_blocks)
        with kv.in_place_of_zeros():
            caches = original(kv_cache_config, device, *args, **kwargs)
        _RANK.kv = kv
        _RANK.rank = DeviceRank(_RANK.swapper, kv, _RANK.memory.background, _RANK.memory.copier.finish)
        return caches

    return allocate_kv_cache


class MorphServeDeviceWorker:
    """Mixed into vLLM's worker class. Commands answer at once; `morphserve_progress` says how they went on."""

    def morphserve_describe(self) -> RankDescription:
        """Bytes per layer and format, in whole pages.

        Raises:
            ConfigError: the model was loaded by a loader that MorphServe does not see.
        """
        if _RANK.layers is None:
            raise ConfigError(
                "the weights were loaded past MorphServe (a custom load_format?). Use load_format auto, "
                "safetensors or dummy."
            )
        return _RANK.layers.describe()

    def morphserve_plan(self, base_num_blocks: int, level_formats: Sequence[tuple[str, ...]]) -> None:
        """The KV cache that is allocated next is laid out for the whole ladder, and has pages for so many blocks.

        Args:
            base_num_blocks: null block included.
            level_formats: of every level, by decoder layer id; CUDA graphs are captured at each.
        """
        _RANK.base_num_blocks, _RANK.level_formats = base_num_blocks, tuple(level_formats)

    def morphserve_worst_forward(self, measure: bool) -> int:
        """0: vLLM has profiled its own, and no page goes to KV that layers did not give up."""
        return 0

    def morphserve_keep_free(self, num_bytes: int, num_ranks: int) -> None:
        """Nothing to do: see above."""

    def morphserve_prepare(self, plan: Plan) -> Reply:
        """Begin to bring the plan's layers in. May fail; then nothing has changed."""

        def prepare() -> bool:
            _rank().prepare(dict(plan.layer_formats))
            return _rank().outcome()

        return _answer(self, plan, prepare)

    def morphserve_commit(self, plan: Plan) -> Reply:
        """Copy, rewrite, switch; then unmap and map beside the next steps."""

        def commit() -> bool:
            if plan.copies:
                try:
                    _kv().move(self.model_runner, plan.copies)  # type: ignore[attr-defined]
                except Exception as e:
                    raise KVUnknown(f"{type(e).__name__}: {e}") from e
            _rank().commit(bool(plan.layer_formats), plan.num_kv_blocks, _show_graphs)
            return _rank().outcome()

        return _answer(self, plan, commit, final=True)

    def morphserve_abort(self, plan: Plan) -> Reply:
        """Drop what was prepared, or is about to be."""

        def abort() -> bool:
            _rank().abort()
            return _rank().outcome()

        return _answer(self, plan, abort, final=True)

    def morphserve_progress(self, plan: Plan) -> Reply:
        """How the last command went on: pending, failed or done."""
        return _RANK.commands.answer(self.rank, plan, _rank().outcome, _figures, again=True)  # type: ignore[attr-defined]

    def morphserve_trim(self) -> None:
        """Nothing of a device's memory lies in the heap."""

    def morphserve_memory(self) -> dict[str, Any]:
        """Bytes in pages, beside what the ledger says. For tests and the status page."""
        assert _RANK.memory is not None
        pool = _RANK.memory.pool
        return {
            "weight_bytes": _RANK.swapper.resident_bytes,
            "staging_bytes": _RANK.swapper.staging_bytes,
            "kv_mapped_bytes": _kv().mapped_bytes,
            "free_page_bytes": pool.num_free * _RANK.memory.page_bytes,
            "formats": _RANK.swapper.formats(),
        }


def _capture_model(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def capture_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _RANK.rank is None or kwargs.get("profile_only"):
            return original(self, *args, **kwargs)
        assert _RANK.layers is not None
        manager = getattr(self, "cudagraph_manager", None)
        if manager is not None and manager.use_breakable_cg:
            manager.init_breakable_cg_runner(self.model)  # else it is made in mid-capture, and belongs to no bank
        _RANK.graphs = LevelGraphs(self, _RANK.swapper, _RANK.rank, _RANK.layers.weights)
        workspace = BankWorkspace()

        def capture() -> int:
            workspace.open()
            num_bytes = int(original(self, *args, **kwargs))
            workspace.check()
            return num_bytes

        return _RANK.graphs.capture(capture, _RANK.level_formats, _kv().num_mapped)

    return capture_model


def _graph_memory(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def profile_cudagraph_memory(self: Any) -> int:
        """vLLM captures one bank to know what graphs take; there is one a level: a bound, as they share pieces."""
        return int(original(self)) * (1 if _RANK.layers is None else _RANK.layers.num_banks)

    return profile_cudagraph_memory


def _available_memory(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def determine_available_memory(self: Any) -> int:
        available = int(original(self))
        if _RANK.layers is not None:
            check_fixed_kv(self, _RANK.layers.num_banks)
        return available

    return determine_available_memory


def _has_layers() -> bool:
    return _RANK.layers is not None


def _warm_up(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self.model_runner, "kv_cache_config", None)
        if _RANK.kv is None or config is None:
            return original(self, *args, **kwargs)
        # Warm-up runs requests on the blocks that this number promises, and most of them have no pages yet.
        laid_out, config.num_blocks = config.num_blocks, _RANK.kv.num_mapped
        try:
            return original(self, *args, **kwargs)
        finally:
            config.num_blocks = laid_out

    return compile_or_warm_up_model


def _show_graphs() -> None:
    """Between two steps, right after the layers have switched: a graph is replayed only at its own formats."""
    if _RANK.graphs is not None:
        _RANK.graphs.show()


def _rank() -> DeviceRank:
    assert _RANK.rank is not None
    return _RANK.rank


def _kv() -> DeviceKV:
    assert _RANK.kv is not None
    return _RANK.kv


def _answer(worker: Any, plan: Plan, action: Callable[[], bool], final: bool = False) -> Reply:
    return _RANK.commands.answer(worker.rank, plan, action, _figures, final=final)


def _figures() -> Figures:
    swapper = _RANK.swapper
    return Figures(_kv().num_mapped, swapper.resident_bytes, swapper.staging_bytes)


install_worker_seams()
