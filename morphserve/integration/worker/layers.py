"""One rank's decoder linears: found while the weights can still be read, made swappable right after.

The loaded tensors (fused and TP-sliced, exactly as vLLM has them) go to a file once, next to their packed variants,
and restoring a layer rebuilds what vLLM made of them from the same bytes (base_linear.py).
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase

from morphserve.config import MorphServeConfig
from morphserve.control import LayerTimes, ladder_formats
from morphserve.errors import ConfigError
from morphserve.errors import StoreError as MorphStoreError
from morphserve.integration.describe import RankDescription
from morphserve.integration.start import served_ladder
from morphserve.integration.worker.base_linear import BaseLinear, applied_bias, base_of, method_of
from morphserve.integration.worker.host_memory import FREED_WEIGHTS_RETURN, weights_on_their_own_pages
from morphserve.integration.worker.layer_speed import TimedLayer, known_or_measured
from morphserve.integration.worker.ops import opaque_linear
from morphserve.integration.worker.profile_source import Plain
from morphserve.integration.worker.recipes import Needs, choose_kernels, formats_of_halves, open_recipe
from morphserve.profile_ladder import read_ladder
from policies import BASE_FORMAT
from quant_layers import (
    FORMATS,
    STORE_SCHEMA,
    Kernel,
    LayerSwapper,
    LinearImpl,
    LinearSlot,
    StoreError,
    TensorSlot,
    VariantStore,
    format_of,
    trim,
)

logger = logging.getLogger("vllm.morphserve")

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
Linears = dict[int, dict[str, LinearBase]]  # decoder layer id |-> name inside the layer |-> linear
Bases = dict[int, dict[str, BaseLinear]]  # the same |-> what it is at level 0


def find_linears(model: torch.nn.Module) -> Linears:
    """All linears inside decoder layers of this rank.

    Raises:
        ConfigError: there are none, or the layers do not all have the same ones.
    """
    found: Linears = {}
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if match and isinstance(module, LinearBase):
            found.setdefault(int(match[1]), {})[match[2]] = module
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no linear under '...layers.<id>.'. MorphServe morphs dense "
            "decoder layers: start without --plugin morphserve for this model."
        )
    names = {tuple(sorted(linears)) for linears in found.values()}
    if len(names) > 1:
        raise ConfigError(
            f"{type(model).__name__}: decoder layers differ in their linears ({sorted(names)}). MorphServe needs "
            "uniform dense layers: start without --plugin morphserve for this model."
        )
    return found


def find_bases(linears: Linears) -> Bases:
    """What each linear is at level 0. Before vLLM packs the weights.

    Raises:
        ConfigError: vLLM runs one in a way that cannot be stored and rebuilt.
    """
    bases: Bases = {}
    for layer, mine in linears.items():
        for name, linear in mine.items():
            base = base_of(linear)
            if base is None:
                raise ConfigError(
                    f"layer {layer} {name} runs {method_of(linear)}; level 0 must be bf16 or fp16 weights, or "
                    "compressed-tensors int8 or float8 with a scale for every row or matrix. Serve such a checkpoint "
                    "of this model; one in 4 bits can be a step of its ladder (`variants: {w4: CHECKPOINT}`)."
                )
            bases.setdefault(layer, {})[name] = base
    return bases


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


def fingerprint(bases: Bases) -> str:
    """Digest of the loaded weights: the cache is addressed by what the weights ARE, not by their path."""
    digest = hashlib.sha256()
    for layer, linears in sorted(bases.items()):
        for name, base in sorted(linears.items()):
            for tensor_name, tensor in base.tensors().items():
                digest.update(f"{layer}/{name}/{tensor_name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class Weights(Mapping[str, torch.Tensor]):
    """A layer's weights by name, each made when it is asked for: in fp32 a quantized one is four times as large."""

    def __init__(self, bases: Mapping[str, BaseLinear]) -> None:
        self._bases = bases

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._bases[name].weight()

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)


class RankLayers:
    """Built in two halves around vLLM's weight post-processing: `capture`, then `install`."""

    def __init__(self, config: MorphServeConfig, vllm_config: Any, rank: int) -> None:
        self.config = config
        self.vllm_config = vllm_config
        self.rank = rank
        self._cache_dir = Path(config.cache_dir).expanduser()
        self.linears: Linears = {}
        self._bases: Bases = {}
        self._base_bytes: dict[int, dict[str, int]] = {}  # that a linear takes at level 0, its bias left out
        self.kernels: dict[str, Kernel] = {}
        self._left_out: dict[str, str] = {}  # format of the settings' ladder |-> why it cannot run here
        self._ladder_formats: tuple[str, ...] = ()  # of layers: halves may differ
        self.store: VariantStore | None = None
        self._recipes: dict[str, Plain] = {}  # by format
        self._tensors: dict[int, dict[str, TensorSlot]] = {}
        self._slots: dict[int, dict[str, LinearSlot]] = {}
        self._layer_times: LayerTimes = {}
        self.swapper: LayerSwapper | None = None

    @property
    def _dtype(self) -> torch.dtype:
        """Of activations."""
        return next(iter(next(iter(self.linears.values())).values())).params_dtype

    def capture(self, model: torch.nn.Module) -> None:
        """Write what is missing in the cache (base tensors and packed variants), verify the rest.

        Raises:
            ConfigError: no such layers, or a configured format that they or this machine cannot have.
            StoreError: the cache cannot be written, or holds damaged files.
        """
        self.linears = find_linears(model)
        self._bases = find_bases(self.linears)
        profile = read_ladder(self.config)
        formats = formats_of_halves(ladder_formats(self.config.ladder, profile))
        self._check_quantized(formats)
        shapes = {tuple(linear.weight.shape) for linears in self.linears.values() for linear in linears.values()}
        choice = choose_kernels(self.config, formats, Needs(self._dtype, shapes=sorted(shapes)))
        self.kernels, self._left_out = choice.kernels, choice.left_out
        self.config = served_ladder(self.config, choice.left_out)
        self._ladder_formats = ladder_formats(self.config.ladder, profile)
        formats = list(self.kernels)
        model_config = self.vllm_config.model_config
        self._recipes = {fmt: open_recipe(self.config, fmt, model, self.linears, model_config) for fmt in formats}
        mark = fingerprint(self._bases)
        directory = self._cache_dir / "variants" / f"{mark[:24]}-{STORE_SCHEMA}"
        try:
            names = {fmt: self._recipes[fmt].layout(kernel) for fmt, kernel in self.kernels.items()}
            self.store = VariantStore.open(directory, mark, names)
            self._fill_store()
            self.store.verify()
        except StoreError as e:
            raise MorphStoreError(str(e)) from e
        leave_heap(model)

    def _check_quantized(self, formats: list[str]) -> None:
        """Refuse what cannot be had with weights that are quantized at level 0."""
        every = [base for bases in self._bases.values() for base in bases.values()]
        quantized = [base for base in every if base.bits == 8]
        if not quantized:
            return
        if self.config.profile is not None:
            raise ConfigError(
                f"profile {self.config.profile} is of bf16 or fp16 weights, these run {quantized[0].method}. "
                "Leave out `profile`; ladder.order and ladder.steps say what is swapped, and when."
            )
        for fmt in formats:
            if FORMATS[fmt].bits >= max(base.bits for base in every):
                raise ConfigError(
                    f"ladder.steps has format {fmt} of {FORMATS[fmt].bits} bits, which frees nothing: the model's own "
                    f"weights have no more ({quantized[0].method}). Set ladder.steps to [{{format: w4}}]."
                )
        inlined = [base for base in quantized if not base.opaque]
        if inlined and opaque_linear.is_compiled(self.vllm_config):
            raise ConfigError(
                f"vLLM runs {inlined[0].method}, whose rounding of activations torch.compile makes one with what comes "
                "before it; behind our operator level 0 would give other tokens. Start with --enforce-eager."
            )

    def _fill_store(self) -> None:
        assert self.store is not None
        built = 0
        for layer, bases in sorted(self._bases.items()):
            if not self.store.has(layer, BASE_FORMAT):
                self.store.write(layer, BASE_FORMAT, {name: base.tensors() for name, base in bases.items()})
                built += 1
            for fmt, kernel in self.kernels.items():
                if not self.store.has(layer, fmt):
                    packed = self._recipes[fmt].pack(layer, kernel, Weights(bases))
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
                impl, bias = self._bases[layer][name].take(), applied_bias(linear)
                self._base_bytes.setdefault(layer, {})[name] = impl.nbytes
                slots[layer][name] = opaque_linear.install(
                    self.vllm_config, self._cache_dir, linear, name, impl, BASE_FORMAT, bias
                )
        reclaim = (lambda: None) if FREED_WEIGHTS_RETURN else trim
        self._slots = slots
        for recipe in self._recipes.values():
            for layer, tensors in recipe.tensor_slots().items():
                self._tensors[layer] = tensors | self._tensors.get(layer, {})
        self.swapper = LayerSwapper(slots, self.store, self.kernels, self._build_base, reclaim, self._tensors)
        names = {fmt: kernel.name for fmt, kernel in self.kernels.items()}
        self._layer_times = known_or_measured(self.store.directory, self._dtype, names, self._layer_to_time)

    def _layer_to_time(self) -> TimedLayer:
        """The first layer in every format, beside the live one; biases and norms of variants make no difference."""
        assert self.store is not None
        layer, slots = min(self._slots.items())
        formats: dict[str, dict[str, LinearImpl]] = {}
        with weights_on_their_own_pages():
            stored = self.store.read(layer, BASE_FORMAT)
            formats[BASE_FORMAT] = {name: self._build_base(layer, name, stored[name]) for name in slots}
            for fmt, kernel in self.kernels.items():
                stored = self.store.read(layer, fmt)
                formats[fmt] = {name: kernel.build(stored[name], slot.bias) for name, slot in slots.items()}
        widths = {name: linear.input_size_per_partition for name, linear in self.linears[layer].items()}
        return TimedLayer(formats, widths, self._dtype)

    def _build_base(self, layer: int, name: str, tensors: dict[str, torch.Tensor]) -> LinearImpl:
        return self._bases[layer][name].build(tensors)

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
            left_out=self._left_out,
            layer_times=self._layer_times,
        )

    def _layer_bytes(self, layer: int, layer_format: str) -> int:
        """What a layer takes in a format beyond its biases, which the module keeps at every level."""
        return sum(
            self._linear_bytes(layer, name, format_of(layer_format, name)) for name in self.linears.get(layer, {})
        )

    def _linear_bytes(self, layer: int, name: str, fmt: str) -> int:
        if fmt == BASE_FORMAT:
            return self._base_bytes[layer][name]
        assert self.store is not None
        stored, bias = self.store.entry(layer, fmt).sizes[name], self._slots[layer][name].bias
        # A variant makes a copy of the bias, in fp32 at most.
        return stored if bias is None else stored + bias.numel() * torch.float32.itemsize

    def prepare(self, changes: dict[int, str]) -> None:
        """Build the new implementations beside the live ones. Layers of other ranks are not ours."""
        assert self.swapper is not None
        mine = {layer: fmt for layer, fmt in changes.items() if layer in self.linears}
        with weights_on_their_own_pages():
            self.swapper.prepare(mine)
