"""One rank's decoder linears on a device: moved into the weight arena, with their variants on the host."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from morphserve.config import MorphServeConfig
from morphserve.control import ladder_formats, largest_chunk_bytes, layers_within
from morphserve.errors import ConfigError
from morphserve.integration.describe import RankDescription
from morphserve.integration.start import nominal_ladder, served_ladder
from morphserve.integration.worker.base_linear import applied_bias, method_of
from morphserve.integration.worker.layers import Linears, find_linears
from morphserve.integration.worker.ops.opaque_linear import MorphLinearMethod, is_compiled
from morphserve.integration.worker.profile_source import Plain
from morphserve.integration.worker.recipes import Needs, choose_kernels, formats_of_halves, open_recipe
from morphserve.profile_ladder import read_ladder
from morphserve.residence import (
    DeviceMemory,
    DeviceSwapper,
    Part,
    WeightArena,
    WeightSlot,
    layer_bytes,
    register_op,
    reset,
)
from policies import BASE_FORMAT
from quant_layers import BIAS, HALVES, Half, Kernel, KernelError, LinearImpl, LinearSlot, TensorSlot, half_of

logger = logging.getLogger("vllm.morphserve")

_WEIGHT = "weight"
# Of the device's memory. A level that is staged whole is never seen half done, so every step has its CUDA graphs.
_RESERVE_SHARE = 0.03


class BaseOnDevice:
    """vLLM's own linear on the parameter, which lies in the arena: what level 0 of the stock server runs."""

    __slots__ = ("_bias", "_linear", "_method", "nbytes")

    def __init__(self, method: Any, linear: LinearBase, bias: Tensor | None) -> None:
        self._method, self._linear, self._bias = method, linear, bias
        self.nbytes = linear.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._method.apply(self._linear, x, self._bias)


class WeightLinearMethod(UnquantizedLinearMethod):
    """`quant_method` of a morphable linear that is compiled: past the tracer, by the address of its weight."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias` is inside the implementation already."""
        return torch.ops.morphserve.linear_of(x, layer.weight)


class DeviceLayers:
    """Built in two halves around vLLM's weight post-processing: `capture`, then `install`."""

    def __init__(self, config: MorphServeConfig, vllm_config: Any, rank: int, memory: DeviceMemory) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._rank = rank
        self._memory = memory
        self._arena = WeightArena(memory.pool, memory.copier)
        self._linears: Linears = {}
        self._kernels: dict[str, Kernel] = {}
        self._recipes: dict[str, Plain] = {}
        self._left_out: dict[str, str] = {}  # format of the settings' ladder |-> why it cannot run here
        self._ladder_formats: tuple[str, ...] = ()
        self._values: dict[tuple[int, str, str], Tensor] = {}  # (layer, norm, format) -> what a variant brings
        self._slots: dict[int, dict[str, LinearSlot]] = {}
        self.swapper: DeviceSwapper | None = None
        self._staging_bytes: int | None = None  # None: as the settings say

    def capture(self, model: torch.nn.Module) -> None:
        """Make every variant, and keep it on the host.

        Raises:
            ConfigError: no such layers, or a format that they or this device cannot have.
        """
        self._linears = find_linears(model)
        for layer, linears in self._linears.items():
            for name, linear in linears.items():
                if not isinstance(linear.quant_method, UnquantizedLinearMethod):
                    raise ConfigError(
                        f"layer {layer} {name} runs {method_of(linear)}; on a GPU level 0 must be bf16 or fp16. "
                        "Serve such a checkpoint of this model; a quantized one can be a step of its ladder "
                        "(`variants: {w4: CHECKPOINT}`)."
                    )
                if self._memory.device_type == "cpu":  # fake pages: vLLM must not pack what is to stay a tensor
                    linear._cpu_skip_gemm_dispatch = True
        profile = read_ladder(self._config)
        formats = formats_of_halves(ladder_formats(self._config.ladder, profile))
        dtype = next(iter(next(iter(self._linears.values())).values())).params_dtype
        shapes = {tuple(linear.weight.shape) for linears in self._linears.values() for linear in linears.values()}
        model_config = self._vllm_config.model_config
        self._recipes = {fmt: open_recipe(self._config, fmt, model, self._linears, model_config) for fmt in formats}
        groups = {fmt: recipe.group_sizes for fmt, recipe in self._recipes.items()}
        needs = Needs(dtype, self._memory.device_type, sorted(shapes), groups)
        choice = choose_kernels(self._config, formats, needs)
        self._kernels, self._left_out = choice.kernels, choice.left_out
        self._recipes = {fmt: recipe for fmt, recipe in self._recipes.items() if fmt in self._kernels}
        self._config = served_ladder(self._config, choice.left_out)
        self._ladder_formats = ladder_formats(self._config.ladder, profile)
        for layer, linears in self._linears.items():
            for fmt, kernel in self._kernels.items():
                self._make(layer, fmt, kernel, linears)

    def _make(self, layer: int, fmt: str, kernel: Kernel, linears: Mapping[str, LinearBase]) -> None:
        recipe = self._recipes[fmt]
        weights = {name: linear.weight.data for name, linear in linears.items()}
        if type(recipe) is not Plain:  # scales and checkpoints are on the host
            weights = {name: weight.cpu() for name, weight in weights.items()}
        device = next(iter(linears.values())).weight.device
        try:
            packed = recipe.pack(layer, kernel, weights)
        except KernelError as e:
            raise ConfigError(f"layer {layer}: {e} Or take {fmt} out of ladder.steps.") from e
        for name in packed.keys() - linears.keys():
            self._values[layer, name, fmt] = packed.pop(name)[_WEIGHT].to(device)
        for half in HALVES:
            mine = {name: tensors for name, tensors in packed.items() if half_of(name) == half}
            if mine:
                self._arena.add(Part(layer, half, fmt), mine)

    def install(self) -> None:
        """Move the parameters into the arena and give every linear its slot. After vLLM's own post-processing.

        Takes pages for one half of a layer at a time, and gives torch's memory back in between: on the way a rank
        never holds more than half a layer twice.

        Raises:
            BackingError: the device has no memory for that, or for the reserve that layers are staged in.
        """
        compiled = is_compiled(self._vllm_config)
        if compiled:
            register_op()
        reset()
        for layer, linears in self._linears.items():
            self._slots[layer] = {}
            for half in HALVES:
                mine = {name: linear for name, linear in linears.items() if half_of(name) == half}
                if mine:
                    self._move_in(layer, half, mine, compiled)
        tensors: dict[int, dict[str, TensorSlot]] = {}
        for recipe in self._recipes.values():
            for layer, slots in recipe.tensor_slots().items():
                tensors[layer] = slots | tensors.get(layer, {})
        self.swapper = DeviceSwapper(self._slots, self._arena, self._build, tensors, self._values)
        transition, sizes = self._config.transition, self._layer_bytes()
        most = transition.layers_per_step
        if transition.max_layers_per_step is None:
            most = layers_within(sizes, most, self._widest_level(), int(_RESERVE_SHARE * self._memory.total_bytes))
            self._staging_bytes = largest_chunk_bytes(sizes, most)
        reserve = largest_chunk_bytes(sizes, most)
        self._memory.release_cached()
        self._memory.pool.create(-(-reserve // self._memory.page_bytes))

    def _move_in(self, layer: int, half: Half, linears: Mapping[str, LinearBase], compiled: bool) -> None:
        part = Part(layer, half, BASE_FORMAT)
        self._arena.add(part, {name: {_WEIGHT: linear.weight.data} for name, linear in linears.items()})
        self._memory.pool.create(self._arena.num_bytes(part) // self._memory.page_bytes)
        self._arena.load([part])
        for name, tensors in self._arena.tensors(part).items():
            linear = linears[name]
            linear.weight.data = tensors[_WEIGHT]
            bias = applied_bias(linear)
            impl = BaseOnDevice(linear.quant_method, linear, bias)
            if compiled:
                slot: LinearSlot = WeightSlot(name, impl, linear.weight, BASE_FORMAT, bias)
                linear.quant_method = WeightLinearMethod()
            else:
                slot = LinearSlot(name, impl, BASE_FORMAT, bias)
                linear.quant_method = MorphLinearMethod(slot)
            self._slots[layer][name] = slot
        self._memory.release_cached()

    def _build(self, layer: int, name: str, fmt: str, tensors: Mapping[str, Tensor]) -> LinearImpl:
        parts = dict(tensors)
        return self._kernels[fmt].build(parts, parts.pop(BIAS, self._slots[layer][name].bias))

    @property
    def num_banks(self) -> int:
        """Levels that differ in this rank's layers, level 0 included: each gets a bank of CUDA graphs."""
        return len(set(self._levels()))

    def _levels(self) -> list[tuple[str, ...]]:
        """Formats of this rank's own layers at every level."""
        own = sorted(self._linears)
        levels = nominal_ladder(self._config, self._vllm_config)
        return [tuple(level.layer_formats[layer] for layer in own) for level in levels]

    def _widest_level(self) -> int:
        """Most layers of this rank that one level changes."""
        return max((sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairwise(self._levels())), default=0)

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
        """Bytes of every decoder layer of the model on this rank, per format, in whole pages."""
        return RankDescription(
            rank=self._rank,
            layer_bytes=self._layer_bytes(),
            largest_linear_bytes=0,  # nothing is built beside what it is built from
            kernels={fmt: kernel.name for fmt, kernel in self._kernels.items()},
            page_bytes=self._memory.page_bytes,
            staging_bytes=self._staging_bytes,
            left_out=self._left_out,
        )

    def _layer_bytes(self) -> dict[str, tuple[int, ...]]:
        num_layers = self._vllm_config.model_config.get_total_num_hidden_layers()
        return {
            fmt: tuple(layer_bytes(self._arena, self._slots.get(i, {}), i, fmt) for i in range(num_layers))
            for fmt in dict.fromkeys((BASE_FORMAT, *self._kernels, *self._ladder_formats))
        }
