"""What a worker can do for the engine: describe its layers, prepare, commit, abort.

vLLM imports this module because `worker_extension_cls` names the class below, before the model is loaded
(vllm/v1/worker/worker_base.py, init_worker). Importing it is what installs the worker's seams: there is no
other moment between "this worker belongs to a MorphServe engine" and "the weights are loaded".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from morphserve.control import Plan, Reply
from morphserve.errors import ConfigError
from morphserve.integration import seams
from morphserve.integration.describe import RankDescription
from morphserve.integration.start import read_settings
from morphserve.integration.worker import headroom
from morphserve.integration.worker.commands import Commands, Figures, KVUnknown
from morphserve.integration.worker.host_memory import resident_bytes, weights_on_their_own_pages
from morphserve.integration.worker.kv import RankKV
from morphserve.integration.worker.layers import RankLayers
from morphserve.residence import wants_device
from quant_layers import trim


class _Rank:
    """This process's rank. Filled while vLLM loads; a process holds one model."""

    def __init__(self) -> None:
        self.layers: RankLayers | None = None
        self.kv: RankKV | None = None
        self.commands = Commands()


_RANK = _Rank()


def install_worker_seams() -> None:
    """Re-entrant; engines of this process without MorphServe pass straight through."""
    seams.wrap(
        "vllm.model_executor.model_loader.base_loader:process_weights_after_loading", _weights_loaded
    )
    seams.wrap("vllm.v1.worker.gpu_model_runner:allocate_kv_cache", _allocate_kv_cache)


def _weights_loaded(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def process_weights_after_loading(model: Any, model_config: Any, target_device: Any) -> Any:
        from vllm.config import get_current_vllm_config_or_none
        from vllm.distributed import get_world_group

        vllm_config = get_current_vllm_config_or_none()
        config = read_settings(getattr(vllm_config, "additional_config", None))
        if config is None or wants_device(target_device.type):
            return original(model, model_config, target_device)
        layers = RankLayers(config, vllm_config, get_world_group().rank)
        layers.capture(model)
        with weights_on_their_own_pages():
            result = original(model, model_config, target_device)
        layers.install()
        # An earlier engine of this process counted its own revisions.
        _RANK.layers, _RANK.kv, _RANK.commands = layers, None, Commands()
        return result

    return process_weights_after_loading


def _allocate_kv_cache(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def allocate_kv_cache(kv_cache_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if _RANK.layers is None or wants_device(device.type):
            return original(kv_cache_config, device, *args, **kwargs)
        kv = RankKV(kv_cache_config)
        with kv.in_place_of_zeros():
            caches = original(kv_cache_config, device, *args, **kwargs)
        _RANK.kv = kv
        return caches

    return allocate_kv_cache


class MorphServeWorker:
    """Mixed into vLLM's worker class. Every method answers; none raises into the engine."""

    def morphserve_describe(self) -> RankDescription:
        """Bytes per layer and format.

        Raises:
            ConfigError: the model was loaded by a loader that MorphServe does not see.
        """
        if _RANK.layers is None:
            raise ConfigError(
                "the weights were loaded past MorphServe (a custom load_format?). Use load_format auto, "
                "safetensors or dummy."
            )
        return _RANK.layers.describe()

    def morphserve_worst_forward(self, measure: bool) -> int | None:
        """Bytes that a worst-case forward pass takes on this rank at most; None = unknown yet, and not measured."""
        return (headroom.measure if measure else headroom.known)(self, rank_layers())

    def morphserve_keep_free(self, num_bytes: int, num_ranks: int) -> None:
        """Before any block is mapped: what all ranks of this host need beside the KV cache."""
        _kv().keep_free(num_bytes, num_ranks)

    def morphserve_prepare(self, plan: Plan) -> Reply:
        """Build the plan's layer variants beside the live ones. May fail; then nothing has changed."""

        def prepare() -> None:
            layers = rank_layers()
            layers.swapper.abort()  # of a plan whose abort never came: its engine has gone on
            layers.prepare(dict(plan.layer_formats))

        return _answer(self, plan, prepare)

    def morphserve_commit(self, plan: Plan) -> Reply:
        """Copy, rewrite, unmap, switch, map: in this order memory never exceeds the ledger."""

        def commit() -> None:
            _release_kv(self, plan)
            if plan.layer_formats:
                rank_layers().swapper.commit()
            _kv().map(plan.num_kv_blocks)

        return _answer(self, plan, commit, final=True)

    def morphserve_apply(self, plan: Plan) -> Reply:
        """Prepare and commit in one command: for engines of one rank, which needs no vote."""

        def apply() -> None:
            _release_kv(self, plan)
            layers = rank_layers()
            layers.prepare(dict(plan.layer_formats))
            layers.swapper.commit()
            _kv().map(plan.num_kv_blocks)

        return _answer(self, plan, apply, final=True)

    def morphserve_abort(self, plan: Plan) -> Reply:
        """Drop what was prepared."""

        def abort() -> None:
            rank_layers().swapper.abort()

        return _answer(self, plan, abort, final=True)

    def morphserve_trim(self) -> None:
        """Return free heap pages to the system; takes milliseconds, so only an idle engine asks."""
        trim()

    def morphserve_memory(self) -> dict[str, Any]:
        """Resident bytes of this worker beside what its ledger says. For tests and the status page."""
        return {
            **resident_bytes(),
            "weight_bytes": rank_layers().swapper.resident_bytes,
            "staging_bytes": rank_layers().swapper.staging_bytes,
            "kv_mapped_bytes": _kv().mapped_bytes,
            "kv_resident_bytes": _kv().resident_bytes,
            "formats": rank_layers().swapper.formats(),
        }


def rank_layers() -> Any:
    assert _RANK.layers is not None and _RANK.layers.swapper is not None
    return _RANK.layers


def _kv() -> RankKV:
    assert _RANK.kv is not None
    return _RANK.kv


def _release_kv(worker: Any, plan: Plan) -> None:
    """Move what must stay, return what may go. First, so that the plan's layers find the memory."""
    kv = _kv()
    kv.start(plan.num_kv_blocks)
    if plan.copies:
        try:
            kv.copy(plan.copies)
            kv.rewrite_block_tables(worker.model_runner, plan.copies)
        except Exception as e:
            raise KVUnknown(f"{type(e).__name__}: {e}") from e
    kv.unmap(plan.num_kv_blocks)


def _answer(worker: Any, plan: Plan, action: Callable[[], None], final: bool = False) -> Reply:
    return _RANK.commands.answer(worker.rank, plan, action, _figures, final=final)


def _figures() -> Figures:
    swapper = rank_layers().swapper
    return Figures(_kv().num_mapped, swapper.resident_bytes, swapper.staging_bytes)


install_worker_seams()
