"""One rank's decoder linears: found while the weights can still be read, made swappable right after.

vLLM's CPU backend turns a bf16 weight into an opaque oneDNN matmul and drops the tensor
(vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm). So the loaded tensors (fused and
TP-sliced, exactly as vLLM has them) go to a file once, next to their packed variants, and restoring a layer
rebuilds the same matmul from the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from morphserve.config import MorphServeConfig
from morphserve.errors import ConfigError
from morphserve.errors import StoreError as MorphStoreError
from morphserve.integration import opaque_linear
from morphserve.integration.describe import RankDescription
from morphserve.integration.host_memory import FREED_WEIGHTS_RETURN, weights_on_their_own_pages
from morphserve.integration.rank_import import Importer
from morphserve.integration.rank_profile import Plain, Smoother
from morphserve.integration.settings import read_ladder
from morphserve.ladder import ladder_formats
from policies.types import BASE_FORMAT
from quant_layers import (
    STORE_SCHEMA,
    Kernel,
    KernelError,
    LayerSwapper,
    LinearSlot,
    StoreError,
    TensorSlot,
    VariantStore,
    choose,
    format_of,
    split_format,
    trim,
)

logger = logging.getLogger("vllm.morphserve")

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
Linears = dict[int, dict[str, LinearBase]]  # decoder layer id |-> name inside the layer |-> linear


class BaseImpl:
    """vLLM's own full-precision linear, as a callable that owns the matmul."""

    __slots__ = ("_bias", "_linear", "native", "nbytes")

    def __init__(self, linear: Any, bias: torch.Tensor | None, nbytes: int) -> None:
        self._linear, self._bias, self.nbytes = linear, bias, nbytes
        handler = _onednn_handler(linear)
        self.native = None if handler is None else ("onednn", (handler,), bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, None, self._bias)


def _onednn_handler(linear: Any) -> torch.Tensor | None:
    """The tensor by which vLLM's closure names its oneDNN matmul; None when it chose another kernel.

    Only a shortcut for the native op: without it the closure itself is called.
    """
    for cell in getattr(linear, "__closure__", None) or ():
        handler = getattr(cell.cell_contents, "handler_tensor", None)
        if isinstance(handler, torch.Tensor):
            return handler
    return None


def find_linears(model: torch.nn.Module) -> Linears:
    """All unquantized linears inside decoder layers of this rank.

    Raises:
        ConfigError: there are none, or the layers do not all have the same ones.
    """
    found: Linears = {}
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if match and isinstance(module, LinearBase) and isinstance(module.quant_method, UnquantizedLinearMethod):
            found.setdefault(int(match[1]), {})[match[2]] = module
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no unquantized linear under '...layers.<id>.'. MorphServe morphs dense "
            "decoder layers: start without --plugin morphserve for this model."
        )
    names = {tuple(sorted(linears)) for linears in found.values()}
    if len(names) > 1:
        raise ConfigError(
            f"{type(model).__name__}: decoder layers differ in their linears ({sorted(names)}). MorphServe needs "
            "uniform dense layers: start without --plugin morphserve for this model."
        )
    return found


def leave_heap(model: torch.nn.Module) -> None:
    """Move the loaded tensors out of the heap.

    vLLM packs module by module and drops each tensor as it goes: its hole in the heap would take the next
    packed linear, whose memory would then stay resident when it is swapped out. Moves one tensor at a time.
    """
    if not FREED_WEIGHTS_RETURN:
        return
    storages = Counter(parameter.untyped_storage().data_ptr() for parameter in model.parameters())
    for parameter in model.parameters():
        if storages[parameter.untyped_storage().data_ptr()] == 1:  # views of one tensor must stay views
            with weights_on_their_own_pages():
                parameter.data = parameter.data.clone()
    trim()


def fingerprint(linears: Linears) -> str:
    """Digest of the loaded weights: the cache is addressed by what the weights ARE, not by their path."""
    digest = hashlib.sha256()
    for layer, name, tensor_name, tensor in _tensors(linears):
        digest.update(f"{layer}/{name}/{tensor_name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _tensors(linears: Linears) -> Iterator[tuple[int, str, str, torch.Tensor]]:
    for layer in sorted(linears):
        for name in sorted(linears[layer]):
            for tensor_name, tensor in base_tensors(linears[layer][name]).items():
                yield layer, name, tensor_name, tensor


def base_tensors(linear: LinearBase) -> dict[str, torch.Tensor]:
    """The tensors that define a linear at full precision: weight [N, K], bias [N] if its forward adds one."""
    tensors = {"weight": linear.weight.data}
    if (bias := applied_bias(linear)) is not None:
        tensors["bias"] = bias.data
    return tensors


def applied_bias(linear: LinearBase) -> torch.Tensor | None:
    """The bias that this linear's forward hands to `apply` (vllm/model_executor/layers/linear.py)."""
    bias = getattr(linear, "bias", None)
    if bias is None or linear.skip_bias_add:
        return None
    # RowParallelLinear adds the bias on one tensor-parallel rank only, before the all-reduce.
    if getattr(linear, "input_is_parallel", False) and linear.tp_rank > 0:
        return None
    return bias


class RankLayers:
    """Built in two halves around vLLM's weight post-processing: `capture`, then `install`."""

    def __init__(self, config: MorphServeConfig, vllm_config: Any, rank: int) -> None:
        self.config = config
        self.vllm_config = vllm_config
        self.rank = rank
        self._cache_dir = Path(config.cache_dir).expanduser()
        self.linears: Linears = {}
        self.kernels: dict[str, Kernel] = {}
        self._ladder_formats: tuple[str, ...] = ()  # of layers: halves may differ
        self.store: VariantStore | None = None
        self._recipes: dict[str, Plain] = {}  # by format
        self._tensors: dict[int, dict[str, TensorSlot]] = {}
        self._slots: dict[int, dict[str, LinearSlot]] = {}
        self.swapper: LayerSwapper | None = None

    def capture(self, model: torch.nn.Module) -> None:
        """Write what is missing in the cache (base tensors and packed variants), verify the rest.

        Raises:
            ConfigError: no such layers, or no kernel on this machine for a configured format.
            StoreError: the cache cannot be written, or holds damaged files.
        """
        self.linears = find_linears(model)
        self._ladder_formats = ladder_formats(self.config.ladder, read_ladder(self.config))
        halves = (half for fmt in self._ladder_formats for half in split_format(fmt))
        formats = [fmt for fmt in dict.fromkeys(halves) if fmt != BASE_FORMAT]
        dtype = next(iter(next(iter(self.linears.values())).values())).weight.dtype
        try:
            self.kernels = {fmt: choose(fmt, dtype, self.config.kernels.get(fmt)) for fmt in formats}
        except KernelError as e:
            raise ConfigError(f"{e} Take that format out of ladder.steps.") from e
        self._recipes = {fmt: self._recipe(fmt, model) for fmt in formats}
        mark = fingerprint(self.linears)
        directory = self._cache_dir / "variants" / f"{mark[:24]}-{STORE_SCHEMA}"
        try:
            names = {fmt: self._recipes[fmt].layout(kernel) for fmt, kernel in self.kernels.items()}
            self.store = VariantStore.open(directory, mark, names)
            self._fill_store()
            self.store.verify()
        except StoreError as e:
            raise MorphStoreError(str(e)) from e
        leave_heap(model)

    def _recipe(self, fmt: str, model: torch.nn.Module) -> Plain:
        """Where the layers of a format come from: a checkpoint, the profile, or the weights as they are."""
        source = self.config.variants.get(fmt)
        if source is not None:
            biases = {
                f"{layer}.{name}"
                for layer, linears in self.linears.items()
                for name, linear in linears.items()
                if applied_bias(linear) is not None
            }
            return Importer.open(source, model, self.linears, biases, self.vllm_config.model_config)
        if self.config.profile is not None:
            return Smoother.open(self.config.profile, model, self.linears)
        return Plain()

    def _fill_store(self) -> None:
        assert self.store is not None
        built = 0
        for layer, linears in sorted(self.linears.items()):
            if not self.store.has(layer, BASE_FORMAT):
                self.store.write(layer, BASE_FORMAT, {n: base_tensors(m) for n, m in linears.items()})
                built += 1
            for fmt, kernel in self.kernels.items():
                if not self.store.has(layer, fmt):
                    weights = {name: linear.weight.data for name, linear in linears.items()}
                    packed = self._recipes[fmt].pack(layer, kernel, weights)
                    self.store.write(layer, fmt, packed, self._recipes[fmt].layout(kernel))
                    built += 1
        if built:
            logger.info("morphserve: rank %d packed %d layer variants into %s", self.rank, built,
                        self.store.directory)

    def install(self) -> None:
        """Give every captured linear its slot. Called after vLLM built its own matmuls."""
        assert self.store is not None
        opaque_linear.reset()
        slots: dict[int, dict[str, LinearSlot]] = {}
        for layer, linears in self.linears.items():
            slots[layer] = {}
            for name, linear in linears.items():
                if linear.weight.numel():
                    raise ConfigError(
                        f"layer {layer} {name}: vLLM kept the weight tensor instead of packing it (no oneDNN on "
                        "this CPU), so swapping it would free nothing. Start without --plugin morphserve here."
                    )
                bias = applied_bias(linear)
                size = opaque_linear.num_outputs(linear) * linear.input_size_per_partition
                impl = BaseImpl(linear.__dict__.pop("cpu_linear"), bias, size * linear.params_dtype.itemsize)
                slots[layer][name] = opaque_linear.install(
                    self.vllm_config, self._cache_dir, linear, name, impl, BASE_FORMAT, bias
                )
        reclaim = (lambda: None) if FREED_WEIGHTS_RETURN else trim
        self._slots = slots
        for recipe in self._recipes.values():
            for layer, tensors in recipe.tensor_slots().items():
                self._tensors[layer] = tensors | self._tensors.get(layer, {})
        self.swapper = LayerSwapper(slots, self.store, self.kernels, self._build_base, reclaim, self._tensors)

    def _build_base(self, layer: int, name: str, tensors: dict[str, torch.Tensor]) -> BaseImpl:
        """vLLM's own constructor on a stand-in module, so that level 0 is stock down to the kernel choice."""
        bias = self._slots[layer][name].bias  # the module keeps it at every level: no second copy
        shadow = SimpleNamespace(weight=torch.nn.Parameter(tensors["weight"], requires_grad=False), bias=bias)
        nbytes = tensors["weight"].nbytes
        dispatch_cpu_unquantized_gemm(shadow, remove_weight=True)  # type: ignore[arg-type]
        if shadow.weight.numel():
            # vLLM swallows the failure and falls back to a matmul on the tensor: not what level 0 runs.
            raise KernelError(f"layer {layer} {name}: vLLM could not build its matmul (out of memory?)")
        return BaseImpl(shadow.cpu_linear, bias, nbytes)

    def describe(self) -> RankDescription:
        """Bytes of every decoder layer of the model on this rank, per format."""
        assert self.store is not None
        num_layers = self.vllm_config.model_config.get_total_num_hidden_layers()
        formats = dict.fromkeys((BASE_FORMAT, *self.kernels, *self._ladder_formats))
        return RankDescription(
            rank=self.rank,
            layer_bytes={fmt: tuple(self._layer_bytes(layer, fmt) for layer in range(num_layers)) for fmt in formats},
            largest_linear_bytes=max(
                slot.impl.nbytes for slots in self._slots.values() for slot in slots.values()
            ),
            kernels={fmt: kernel.name for fmt, kernel in self.kernels.items()},
        )

    def _layer_bytes(self, layer: int, layer_format: str) -> int:
        """What a layer takes in a format beyond its biases, which the module keeps at every level."""
        return sum(
            self._linear_bytes(layer, name, format_of(layer_format, name)) for name in self.linears.get(layer, {})
        )

    def _linear_bytes(self, layer: int, name: str, fmt: str) -> int:
        assert self.store is not None
        bias = self._slots[layer][name].bias
        stored = self.store.entry(layer, fmt).sizes[name]
        if bias is None:
            return stored
        if fmt == BASE_FORMAT:
            return stored - bias.nbytes
        return stored + bias.numel() * torch.float32.itemsize  # a variant makes a copy of it, in fp32 at most

    def prepare(self, changes: dict[int, str]) -> None:
        """Build the new implementations beside the live ones. Layers of other ranks are not ours."""
        assert self.swapper is not None
        mine = {layer: fmt for layer, fmt in changes.items() if layer in self.linears}
        with weights_on_their_own_pages():
            self.swapper.prepare(mine)

