"""What a worker can do for the engine: describe its layers, prepare, commit, abort.

vLLM imports this module because `worker_extension_cls` names the class below, before the model is loaded
(vllm/v1/worker/worker_base.py, init_worker). Importing it is what installs the worker's seams: there is no
other moment between "this worker belongs to a MorphServe engine" and "the weights are loaded".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kv_resize import KVResizeError
from morphserve.control import Plan, Reply
from morphserve.errors import ConfigError
from morphserve.integration import seams
from morphserve.integration.describe import RankDescription
from morphserve.integration.start import for_this_device, serving_residence, settings_of
from morphserve.integration.worker import headroom
from morphserve.integration.worker.commands import Figures, KVUnknown
from morphserve.integration.worker.cuda.hooks import install_cuda_seams, show_graphs
from morphserve.integration.worker.kv import RankKV
from morphserve.integration.worker.layers import RankLayers
from morphserve.integration.worker.refusals import refuse_weight_access
from morphserve.integration.worker.state import Rank, begin, rank
from morphserve.residence import RankSizes, RankTransition

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.worker_base import WorkerBase


def install_worker_seams() -> None:
    """Wrap what loads weights and allocates KV. Re-entrant; engines without MorphServe pass straight through."""
    seams.wrap(seams.WEIGHTS_LOADED, _weights_loaded)
    seams.wrap(seams.KV_ALLOC, _allocate_kv_cache)
    refuse_weight_access(_has_layers)
    if serving_residence().in_pages:
        install_cuda_seams(_allocate_kv_cache)


def _has_layers() -> bool:
    return rank().layers is not None


def _forward_stream() -> object:
    """Ask as vLLM asks, which then keeps to the stream that it gets."""
    from vllm.utils.torch_utils import current_stream

    return current_stream()


def _weights_loaded(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def process_weights_after_loading(
        model: torch.nn.Module, model_config: ModelConfig, target_device: torch.device
    ) -> Any:
        from vllm.config import get_current_vllm_config_or_none
        from vllm.distributed import get_world_group

        vllm_config = get_current_vllm_config_or_none()
        config = settings_of(vllm_config)
        if (old := rank().residence) is not None:  # of an earlier engine of this process: its memory is wanted
            old.close()
            begin(Rank())
        if config is None:
            return original(model, model_config, target_device)
        try:
            residence = serving_residence().open(target_device, _forward_stream, _sizes(model, vllm_config))
            layers = RankLayers(for_this_device(config, vllm_config), vllm_config, get_world_group().rank, residence)
            layers.capture(model)
            with residence.loading():
                result = original(model, model_config, target_device)
            layers.install()
        except KVResizeError as e:
            raise ConfigError(f"no pages for the decoder layers: {e}") from e
        begin(Rank(residence, layers))
        return result

    return process_weights_after_loading


def _allocate_kv_cache(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def allocate_kv_cache(kv_cache_config: KVCacheConfig, device: torch.device, *args: Any, **kwargs: Any) -> Any:
        mine = rank()
        if mine.residence is None or mine.base_num_blocks is None:
            return original(kv_cache_config, device, *args, **kwargs)
        kv = RankKV(kv_cache_config, mine.residence, mine.base_num_blocks)
        with kv.in_place_of_zeros():
            caches = original(kv_cache_config, device, *args, **kwargs)
        mine.kv = kv
        held = mine.residence
        mine.transition = RankTransition(
            mine.swapper, kv, held.background, held.finish, _layers().patience, held.fence
        )
        return caches

    return allocate_kv_cache


class MorphServeWorker:
    """Mixed into vLLM's worker class. Every command answers at once, and none raises into the engine.

    Where memory goes by the page, what takes pages goes on beside the forward passes: a command then answers that it is
    pending, and `morphserve_progress` says how it went on.
    """

    def morphserve_describe(self) -> RankDescription:
        """Return the bytes per layer and format.

        Raises:
            ConfigError: the model was loaded by a loader that MorphServe does not see.
        """
        return _layers().describe()

    def morphserve_plan(self, base_num_blocks: int, level_formats: Sequence[tuple[str, ...]]) -> None:
        """Lay the KV cache that is allocated next out for the whole ladder.

        Args:
            base_num_blocks: of level 0, null block included.
            level_formats: of every level, by decoder layer id; CUDA graphs are captured at each.
        """
        rank().base_num_blocks, rank().level_formats = base_num_blocks, tuple(level_formats)

    def morphserve_kept_for_graphs(self) -> int:
        """Return the bytes that are kept free of KV blocks for the CUDA graphs of levels above 0."""
        return rank().graph_set_bytes * (_layers().num_graph_sets - 1)

    def morphserve_unused_by_graphs(self) -> int:
        """Return how many of them the graphs, which have been captured, have not taken."""
        mine = rank()
        return 0 if mine.graphs is None else mine.graphs.unused(mine.graph_set_bytes)

    def morphserve_extend(self, num_blocks: int) -> int:
        """Back KV blocks up to `num_blocks` with new memory, as far as there is any; returns how many are backed."""
        kv = rank().kv
        assert kv is not None
        return kv.extend(num_blocks)

    def morphserve_worst_forward(self, measure: bool) -> int | None:
        """Return the bytes that a worst-case forward pass takes on this rank at most.

        None = unknown yet, and not measured. 0 where vLLM has profiled its own, and no page goes to KV that layers did
        not give up.
        """
        if _layers().directory is None:
            return 0
        return (headroom.measure if measure else headroom.known)(self, _layers())

    def morphserve_keep_free(self, num_bytes: int, num_ranks: int) -> None:
        """Keep free what all ranks of this host need beside the KV cache. Before any block is mapped."""
        residence = rank().residence
        assert residence is not None
        residence.keep_free(num_bytes, num_ranks)

    def morphserve_prepare(self, plan: Plan) -> Reply:
        """Begin to bring the plan's layers in beside the live ones. May fail; then nothing has changed."""

        def prepare(transition: RankTransition) -> None:
            transition.prepare(_layers().own(dict(plan.layer_formats)))

        return _answer(self, plan, prepare)

    def morphserve_commit(self, plan: Plan) -> Reply:
        """Carry a plan out, in the order that `Plan` says: so memory never exceeds the ledger."""

        def commit(transition: RankTransition) -> None:
            if plan.copies:
                _move_blocks(self, plan)
            _forget_blocks(self, plan)
            if plan.alone:
                transition.prepare_and_commit(_layers().own(dict(plan.layer_formats)), plan.num_kv_blocks)
            else:
                transition.commit(bool(plan.layer_formats), plan.num_kv_blocks, show_graphs)

        return _answer(self, plan, commit, final=True)

    def morphserve_abort(self, plan: Plan) -> Reply:
        """Drop what was prepared, or is about to be."""
        return _answer(self, plan, RankTransition.abort, final=True)

    def morphserve_progress(self, plan: Plan) -> Reply:
        """Return how the last command went on: pending, failed or done."""
        return _answer(self, plan, lambda transition: None, again=True)

    def morphserve_trim(self) -> None:
        """Return free heap pages to the system; takes milliseconds, so only an idle engine asks."""
        residence = rank().residence
        assert residence is not None
        residence.trim()

    def morphserve_memory(self) -> dict[str, Any]:
        """Return the resident bytes of this worker beside what its ledger says. For tests and the status page."""
        mine = rank()
        assert mine.residence is not None and mine.kv is not None
        return {
            **mine.residence.figures(),
            "weight_bytes": mine.swapper.resident_bytes,
            "staging_bytes": mine.swapper.staging_bytes,
            "kv_mapped_bytes": mine.kv.mapped_bytes,
            "kv_resident_bytes": mine.kv.resident_bytes,
            "formats": mine.swapper.formats(),
        }


def _layers() -> RankLayers:
    layers = rank().layers
    if layers is None:
        raise ConfigError(
            "the weights were loaded past MorphServe (a custom load_format?). Use load_format auto, safetensors or "
            "dummy."
        )
    return layers


def _sizes(model: torch.nn.Module, vllm_config: VllmConfig) -> RankSizes:
    """Return what is known of this rank before it has a KV cache, which is taken to hold 16 bits."""
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_layers = config.get_num_layers(parallel)
    layer_bytes = sum(parameter.nbytes for parameter in model.parameters()) // num_layers
    token_bytes = 2 * 2 * config.get_num_kv_heads(parallel) * config.get_head_size()
    return RankSizes(num_layers, layer_bytes, token_bytes * vllm_config.cache_config.block_size)


def _move_blocks(worker: WorkerBase, plan: Plan) -> None:
    kv = rank().kv
    assert kv is not None
    try:
        kv.copy(plan.copies)
        kv.rewrite_block_tables(worker.model_runner, plan.copies)
    except Exception as e:
        raise KVUnknown(f"{type(e).__name__}: {e}") from e


def _forget_blocks(worker: WorkerBase, plan: Plan) -> None:
    kv = rank().kv
    assert kv is not None
    try:
        kv.forget_blocks(worker.model_runner, plan.num_kv_blocks)
    except Exception as e:
        raise KVUnknown(f"{type(e).__name__}: {e}") from e


def _answer(
    worker: WorkerBase, plan: Plan, command: Callable[[RankTransition], None], final: bool = False, again: bool = False
) -> Reply:
    """Reply to a command, with what the rank then holds; see `Commands.answer`."""
    mine = rank()
    transition, kv = mine.transition, mine.kv
    assert transition is not None and kv is not None

    def run() -> bool:
        command(transition)
        return transition.outcome()

    def figures() -> Figures:
        return Figures(kv.num_mapped, mine.swapper.resident_bytes, mine.swapper.staging_bytes, kv.short_of)

    return mine.commands.answer(worker.rank, plan, run, figures, final=final, again=again)


install_worker_seams()
