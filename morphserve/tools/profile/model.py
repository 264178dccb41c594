"""A transformers model whose decoder layers are read one at a time, so that it may be larger than memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from morphserve.errors import ProfilingError
from morphserve.tools.profile.text import decoder_layers
from quant_layers import tensor_files

LayerTensors = dict[str, Tensor]  # name inside the layer |-> tensor


class _Recorded(Exception):
    """The last layer was called: the rest of the pass is not needed."""


class StreamedModel:
    """Embeddings, final norm and head in memory; decoder layers on disk until they are asked for.

    Everything is computed in fp32: what is looked for are differences, and bf16 has its own.
    """

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: config.json and safetensors files.

        Raises:
            ProfilingError: no dense decoder, or tensors are missing.
        """
        self.directory = directory
        try:
            self.config = AutoConfig.from_pretrained(directory)
            with init_empty_weights(include_buffers=False):
                self.module = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except Exception as error:  # what transformers makes of a config that is damaged, or of another kind of model
            raise ProfilingError(
                f"{directory}: transformers makes no language model of its config.json ({error}). Give a model."
            ) from error
        self.module.eval().requires_grad_(False)
        self.layers = decoder_layers(self.module)
        self._files = tensor_files(directory)
        first = next(iter(self.layers.named_parameters()))[0]
        self._prefix = _prefix_of(self.module, self.layers)
        if f"{self._prefix}{first}" not in self._files:
            raise ProfilingError(
                f"{directory} has no tensor {self._prefix}{first}, which transformers' {type(self.module).__name__} "
                "expects. Save the model with transformers' save_pretrained first."
            )
        self._load_outside()

    def __len__(self) -> int:
        return len(self.layers)

    def layer(self, index: int) -> LayerTensors:
        """Return all tensors of a decoder layer as the checkpoint has them.

        Raises:
            ProfilingError: one is missing.
        """
        names = [name for name, _ in self.layers[index].named_parameters()]
        return {name: self._tensor(f"{self._prefix}{index}.{name}") for name in names}

    def begin(self, windows: Iterable[Tensor]) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
        """Hidden states in front of the first layer, and what else every layer's forward takes.

        Layers of one model differ in that: some attend to a sliding window, with another rotary table.

        Args:
            windows: token ids, [num_tokens] each.

        Returns:
            One [1, num_tokens, hidden_size] a window, and keyword arguments by layer and window.
        """
        hidden: list[Tensor] = []
        arguments: list[list[dict[str, Any]]] = [[] for _ in self.layers]

        def record(index: int) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                states: Tensor = args[0] if args else kwargs.pop("hidden_states")
                if index == 0:
                    hidden.append(states)
                arguments[index].append(kwargs)
                if index == len(self.layers) - 1:
                    raise _Recorded
                return states

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = record(index)
        try:
            for window in windows:
                with contextlib.suppress(_Recorded):
                    self.module(window[None], use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        return hidden, arguments

    def run(
        self, index: int, tensors: LayerTensors, hidden: Tensor, arguments: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        """Hidden states [1, num_tokens, hidden_size] behind the layer with these tensors in it, computed in `dtype`."""
        values = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        kwargs = {name: _cast(value, dtype) for name, value in arguments.items()}
        out = functional_call(self.layers[index], values, (hidden.to(dtype),), kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [num_tokens, vocabulary] of hidden states [1, num_tokens, hidden_size] behind the last layer."""
        logits: Tensor = self.module.lm_head(self.module.model.norm(hidden))[0]
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def norms(self) -> Iterator[tuple[str, Tensor]]:
        """Norm weights of all layers, by the name below the list of layers."""
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                yield name, self._tensor(f"{self._prefix}{name}")

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the layer's linears by name; their weights are not in them."""
        return {name: m for name, m in self.layers[index].named_modules() if isinstance(m, nn.Linear)}

    @contextmanager
    def rounding_inputs(self, index: int, how: Callable[[Tensor], Tensor], names: set[str]) -> Iterator[None]:
        """Let these linears of the layer see their input as `how` rounds it."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (how(args[0]), *args[1:])

        linears = self.linears(index)
        handles = [linears[name].register_forward_pre_hook(hook) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _load_outside(self) -> None:
        inside = {id(parameter) for parameter in self.layers.parameters()}
        for name, parameter in list(self.module.named_parameters()):
            if id(parameter) not in inside and name in self._files:
                module, _, last = name.rpartition(".")
                values = nn.Parameter(self._tensor(name).float(), requires_grad=False)
                setattr(self.module.get_submodule(module), last, values)
        self.module.tie_weights()  # what is tied is stored once
        inside = {id(parameter) for parameter in self.layers.parameters()}
        for name, parameter in self.module.named_parameters():
            if parameter.is_meta and id(parameter) not in inside:
                raise ProfilingError(f"{self.directory} has no tensor {name}. Fetch the model again.")

    def _tensor(self, name: str) -> Tensor:
        file = self._files.get(name)
        if file is None:
            raise ProfilingError(f"{self.directory} has no tensor {name}. Fetch the model again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                found: Tensor = tensors.get_tensor(name).clone()
        except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
            raise ProfilingError(f"{file} cannot be read ({error}). Fetch the model again.") from error
        return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, alone or in a tuple, in `dtype`."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _prefix_of(module: nn.Module, part: nn.Module) -> str:
    """Name of `part` in `module`, with the dot that follows."""
    return next(f"{name}." for name, found in module.named_modules() if found is part)
