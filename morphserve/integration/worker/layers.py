"""One rank's decoder linears: taken over while vLLM loads them, and swappable from then on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from morphserve.config import MorphServeConfig
from morphserve.control import LayerTimes, ladder_formats
from morphserve.errors import ConfigError
from morphserve.errors import StoreError as MorphStoreError
from morphserve.integration.describe import RankDescription
from morphserve.integration.start import nominal_ladder, served_ladder
from morphserve.integration.worker.layer_speed import TimedLayer, known_or_measured
from morphserve.integration.worker.linears import Bases, Linears, Weights, find_bases, find_linears, fingerprint
from morphserve.integration.worker.ops import opaque_linear
from morphserve.integration.worker.profile_source import Plain
from morphserve.integration.worker.sources import Needs, choose_kernels, formats_of_halves, open_source
from morphserve.profile_ladder import read_ladder
from morphserve.residence import Parts, PartsKey, Patience, Residence, WeightSlot
from policies import BASE_FORMAT
from quant_layers import (
    BIAS,
    FORMATS,
    HALVES,
    FirstLook,
    Kernel,
    KernelError,
    LayerSwapper,
    LayerTensors,
    LinearImpl,
    LinearSlot,
    LoadedPart,
    Part,
    StoreError,
    TensorSlot,
    half_of,
    split_format,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.morphserve")

_LONGEST_READ_PAUSE_S = 1.0  # a disk that is away costs each attempt so much, whatever pauses are allowed


class RankLayers:
    """Built in two halves around vLLM's weight post-processing: `capture`, then `install`."""

    def __init__(self, config: MorphServeConfig, vllm_config: VllmConfig, rank: int, residence: Residence) -> None:
        """
        Args:
            config: the settings, filled in for this device.
            vllm_config: vLLM's.
            rank: global rank.
            residence: where the layers will have their bytes.
        """
        self._config = config
        self._vllm_config = vllm_config
        self._rank = rank
        self._residence = residence
        self.linears: Linears = {}
        self.kernels: dict[str, Kernel] = {}
        self._bases: Bases = {}
        self._sources: dict[str, Plain] = {}  # by format
        self._left_out: dict[str, str] = {}  # format of the settings' ladder |-> why it cannot run here
        self._ladder_formats: tuple[str, ...] = ()  # of layers: halves may differ
        self._parts: Parts | None = None
        self._slots: dict[int, dict[str, LinearSlot]] = {}
        self._layer_times: LayerTimes = {}
        self._norm_offset = 0.0
        self._staging_bytes: int | None = None  # None: as the settings say
        self.swapper: LayerSwapper | None = None

    # ---- before vLLM's post-processing

    def capture(self, model: torch.nn.Module) -> None:
        """Keep every layer in every format, outside of the memory that serves.

        Raises:
            ConfigError: no such layers, or a configured format that they or this machine cannot have.
            StoreError: what is kept cannot be written, or is damaged.
        """
        self.linears = find_linears(model)
        # vllm/model_executor/layers/layernorm.py: Gemma's multiply by 1 + weight
        self._norm_offset = float(any(type(module).__name__ == "GemmaRMSNorm" for module in model.modules()))
        self._bases = find_bases(self.linears, self._residence.in_pages)
        profile = read_ladder(self._config)
        formats = formats_of_halves(ladder_formats(self._config.ladder, profile))
        self._check_quantized(formats)
        self._choose_kernels(model, formats)
        self._config = served_ladder(self._config, self._left_out)
        self._ladder_formats = ladder_formats(self._config.ladder, profile)
        try:
            self._keep()
        except StoreError as e:
            raise MorphStoreError(str(e)) from e
        self._residence.loaded(model)

    def _check_quantized(self, formats: list[str]) -> None:
        """Refuse what cannot be had with weights that are quantized at level 0."""
        every = [base for bases in self._bases.values() for base in bases.values()]
        quantized = [base for base in every if base.bits == 8]
        if not quantized:
            return
        if self._config.profile is not None:
            raise ConfigError(
                f"profile {self._config.profile} is of bf16 or fp16 weights, these run {quantized[0].method}. "
                "Leave out `profile`; ladder.order and ladder.steps say what is swapped, and when."
            )
        for fmt in formats:
            if FORMATS[fmt].bits >= max(base.bits for base in every):
                raise ConfigError(
                    f"ladder.steps has format {fmt} of {FORMATS[fmt].bits} bits, which frees nothing: the model's own "
                    f"weights have no more ({quantized[0].method}). Set ladder.steps to [{{format: w4}}]."
                )
        inlined = [base for base in quantized if not base.opaque]
        if inlined and opaque_linear.is_compiled(self._vllm_config):
            raise ConfigError(
                f"vLLM runs {inlined[0].method}, whose rounding of activations torch.compile makes one with what comes "
                "before it; behind our operator level 0 would give other tokens. Start with --enforce-eager."
            )

    def _choose_kernels(self, model: torch.nn.Module, formats: list[str]) -> None:
        model_config = self._vllm_config.model_config
        sources = {fmt: open_source(self._config, fmt, model, self.linears, model_config) for fmt in formats}
        shapes = {tuple(linear.weight.shape) for linears in self.linears.values() for linear in linears.values()}
        groups = {fmt: source.group_sizes for fmt, source in sources.items()}
        needs = Needs(self._dtype, self._residence.device_type, sorted(shapes), groups)
        choice = choose_kernels(self._config, formats, needs)
        self.kernels, self._left_out = choice.kernels, choice.left_out
        self._sources = {fmt: sources[fmt] for fmt in self.kernels}

    def _keep(self) -> None:
        layouts = {fmt: self._sources[fmt].layout(kernel) for fmt, kernel in self.kernels.items()}
        cache_dir = Path(self._config.cache_dir).expanduser()
        key = PartsKey(cache_dir, lambda: fingerprint(self._bases), layouts, self.kernels)
        self._parts = parts = self._residence.open_parts(key, self._build)
        for layer, bases in sorted(self._bases.items()):
            parts.keep(layer, BASE_FORMAT, lambda bases=bases: {name: base.tensors() for name, base in bases.items()})
            for fmt in self.kernels:
                parts.keep(layer, fmt, lambda layer=layer, fmt=fmt: self._pack(layer, fmt))
        parts.seal()

    def _pack(self, layer: int, fmt: str) -> LayerTensors:
        source = self._sources[fmt]
        weights = Weights(self._bases[layer], on_host=type(source) is not Plain)  # as scales and checkpoints are
        try:
            return source.pack(layer, self.kernels[fmt], weights)
        except KernelError as e:
            raise ConfigError(f"layer {layer}: {e} Or take {fmt} out of ladder.steps.") from e

    # ---- behind it

    def install(self) -> None:
        """Take over what vLLM built, and give every linear its slot.

        Raises:
            BackingError: the device has no memory for that, or for the reserve that layers are staged in.
        """
        assert self._parts is not None
        opaque_linear.reset()
        live: dict[Part, LoadedPart] = {}
        for layer, bases in self._bases.items():
            self._slots[layer] = {}
            for half in HALVES:
                part, mine = Part(layer, half, BASE_FORMAT), {n: b for n, b in bases.items() if half_of(n) == half}
                if mine:
                    live[part] = self._parts.adopt(part, mine)
                    self._install(part, live[part].linears)
        tensors: dict[int, dict[str, TensorSlot]] = {}
        for source in self._sources.values():
            for layer, slots in source.tensor_slots().items():
                tensors[layer] = slots | tensors.get(layer, {})
        self.swapper = self._swapper(live, tensors)
        self._reserve()
        if self.directory is not None:
            names = {fmt: kernel.name for fmt, kernel in self.kernels.items()}
            self._layer_times = known_or_measured(self.directory, self._dtype, names, self._layer_to_time)

    def _swapper(
        self, live: Mapping[Part, LoadedPart], tensors: Mapping[int, Mapping[str, TensorSlot]]
    ) -> LayerSwapper:
        """Return the swapper, which looks at what each format computes: here, and when it is staged first.

        Not in pages: there a layer is staged beside the steps, whose scratch memory kernels share.

        Raises:
            ConfigError: a format computes something else than the model.
        """
        assert self._parts is not None
        if self._residence.in_pages:
            return LayerSwapper(self._slots, live, self._parts, tensors)
        layer, linears = min(self.linears.items())
        widths = {name: linear.input_size_per_partition for name, linear in linears.items()}
        remedy = (
            f"delete {self.directory}, and the next start makes it again; if it says the same, name another of "
            "`kernels` or `variants`, or take the format out of ladder.steps"
        )
        look = FirstLook(widths, self._dtype, self._norm_offset, remedy)
        swapper = LayerSwapper(self._slots, live, self._parts, tensors, look)
        for fmt in self.kernels:
            try:
                swapper.prepare({layer: fmt})
            except KernelError as e:
                raise ConfigError(str(e)) from e
            swapper.abort()
        look.again()
        return swapper

    def _install(self, part: Part, linears: Mapping[str, LinearImpl]) -> None:
        place = opaque_linear.Place(
            opaque_linear.is_compiled(self._vllm_config),
            self._residence.in_pages,
            Path(self._config.cache_dir).expanduser(),
        )
        for name, impl in linears.items():
            linear, bias = self.linears[part.layer][name], self._bases[part.layer][name].bias
            slot = LinearSlot(name, impl, part.format, bias)
            self._slots[part.layer][name] = opaque_linear.install(place, linear, slot)

    def _reserve(self) -> None:
        """Take memory for staging layers: as many as the settings say, else the device."""
        transition = self._config.transition
        least = most = transition.layers_per_step
        if transition.max_layers_per_step is None and self._residence.in_pages:
            least, most = 1, self._widest_level()
        cache = self._vllm_config.cache_config
        room = (cache.gpu_memory_utilization, cache.kv_cache_memory_bytes)
        reserved = self._residence.reserve(self._layer_bytes(), least, most, *room)
        if transition.max_layers_per_step is None:
            self._staging_bytes = reserved

    def _layer_to_time(self) -> TimedLayer:
        """Return the first layer in every format, beside the live one."""
        assert self._parts is not None
        layer, slots = min(self._slots.items())
        halves = dict.fromkeys(half_of(name) for name in slots)
        formats: dict[str, dict[str, LinearImpl]] = {}
        for fmt in (BASE_FORMAT, *self.kernels):
            loaded = self._parts.load([Part(layer, half, fmt) for half in halves])
            formats[fmt] = {name: linear for part in loaded.values() for name, linear in part.linears.items()}
        widths = {name: linear.input_size_per_partition for name, linear in self.linears[layer].items()}
        return TimedLayer(formats, widths, self._dtype)

    def _build(self, layer: int, name: str, fmt: str, tensors: dict[str, torch.Tensor]) -> LinearImpl:
        if fmt == BASE_FORMAT:
            return self._bases[layer][name].build(tensors)
        return self.kernels[fmt].build(tensors, tensors.pop(BIAS, self._slots[layer][name].bias))

    # ---- while serving

    def own(self, changes: Mapping[int, str]) -> dict[int, str]:
        """Return the changes of layers that are on this rank: pipeline stages have others."""
        return {layer: fmt for layer, fmt in changes.items() if layer in self.linears}

    def switch(self, changes: Mapping[int, str]) -> None:
        """Put layers in other formats at once. For when nothing is served yet."""
        assert self.swapper is not None
        self.swapper.prepare(changes)
        self.swapper.commit()
        self.swapper.reclaim()

    # ---- what it says of itself

    @property
    def patience(self) -> Patience:
        """With the disk that its files lie on: half of what the controller waits for a rank is left to the building."""
        transition = self._config.transition
        return Patience(min(transition.max_pause_ms / 1000, _LONGEST_READ_PAUSE_S), transition.rank_timeout_s / 2)

    @property
    def directory(self) -> Path | None:
        """Where figures that were measured of these layers are kept between starts; None = none are measured."""
        return None if self._parts is None else self._parts.directory

    @property
    def _dtype(self) -> torch.dtype:
        """Of activations."""
        return next(iter(next(iter(self.linears.values())).values())).params_dtype

    @property
    def num_graph_sets(self) -> int:
        """Levels that differ in this rank's layers, level 0 included: each gets a set of CUDA graphs."""
        return len(set(self._levels()))

    @property
    def weights(self) -> dict[int, int]:
        """Address of each weight that is looked up at run time |-> its decoder layer; empty where none is."""
        return {
            slot.address: layer
            for layer, slots in self._slots.items()
            for slot in slots.values()
            if isinstance(slot, WeightSlot)
        }

    def describe(self) -> RankDescription:
        """Return the bytes of every decoder layer of the model on this rank, per format, and what runs them."""
        assert self._parts is not None
        return RankDescription(
            rank=self._rank,
            layer_bytes=self._layer_bytes(),
            largest_linear_bytes=self._parts.scratch_bytes,
            kernels={fmt: kernel.name for fmt, kernel in self.kernels.items()},
            page_bytes=self._residence.page_bytes,
            staging_bytes=self._staging_bytes,
            left_out=self._left_out,
            layer_times=self._layer_times,
        )

    def _layer_bytes(self) -> dict[str, tuple[int, ...]]:
        num_layers = self._vllm_config.model_config.get_total_num_hidden_layers()
        formats = dict.fromkeys((BASE_FORMAT, *self.kernels, *self._ladder_formats))
        return {fmt: tuple(self._bytes_of(layer, fmt) for layer in range(num_layers)) for fmt in formats}

    def _bytes_of(self, layer: int, layer_format: str) -> int:
        """Return what a layer takes in a format; 0 for those of other pipeline stages."""
        assert self._parts is not None
        halves = zip(HALVES, split_format(layer_format), strict=True)
        return sum(self._parts.num_bytes(Part(layer, half, fmt)) for half, fmt in halves)

    def _levels(self) -> list[tuple[str, ...]]:
        """Return the formats of this rank's own layers at every level."""
        own = sorted(self.linears)
        levels = nominal_ladder(self._config, self._vllm_config)
        return [tuple(level.layer_formats[layer] for layer in own) for level in levels]

    def _widest_level(self) -> int:
        """Return how many layers of this rank one level changes at most."""
        return max((sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairwise(self._levels())), default=0)
