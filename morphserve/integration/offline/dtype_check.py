"""What of a model in one dtype could be swapped on this machine: vLLM's linear, our kernels, and how fast they are.

Nothing is loaded. A decoder layer with the demo model's shapes and random weights goes the way of a served one: vLLM
packs it, the packed linears are taken over, dropped and rebuilt, and each format's kernel stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from morphserve.control import DEFAULT_FORMATS, LayerTimes
from morphserve.errors import ConfigError
from morphserve.integration.worker.layer_speed import TimedLayer, factors, time_layer
from policies import BASE_FORMAT
from quant_layers import FORMATS, KernelReport, LinearImpl, by_preference, probe

DTYPES = ("bfloat16", "float16", "float32")

# [N, K] of SmolLM2-135M's linears.
_SHAPES = MappingProxyType(
    {
        "self_attn.qkv_proj": (960, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_up_proj": (3072, 576),
        "mlp.down_proj": (576, 1536),
    }
)


@dataclass(frozen=True, slots=True)
class DtypeReport:
    """What was found for one dtype of activations.

    Attributes:
        dtype: as `--dtype` takes it.
        kernels: every kernel's self-test.
        chosen: format |-> the kernel that runs it unless `kernels:` names one; None = no kernel does.
        base: what multiplies at level 0; empty where that is not known.
        times: of the layer's linears, by format, chosen kernels and 'base'; empty where they were not taken.
        problem: what stops a server with the default ladder; empty = it can start.
    """

    dtype: str
    kernels: tuple[KernelReport, ...]
    chosen: dict[str, str | None]
    base: str = ""
    times: LayerTimes | None = None
    problem: str = ""

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that can stand in a ladder."""
        return tuple(fmt for fmt, kernel in self.chosen.items() if kernel is not None)

    @property
    def factors(self) -> dict[str, tuple[float, ...]]:
        """Format |-> what it takes over level 0, one a batch of TIMED_BATCHES; empty where that was not measured."""
        return factors(self.times) if self.times else {}


def check_dtype(name: str, device: str = "cpu", with_base: bool = True) -> DtypeReport:
    """Test every kernel, and build and time a layer. Never raises; takes a second or two.

    Args:
        name: of the dtype.
        device: type of torch.
        with_base: whether vLLM can be asked for its linears here.
    """
    dtype = getattr(torch, name)
    reports = probe(dtype, device)
    chosen = {fmt: _first(fmt, device, reports) for fmt in FORMATS}
    problem = ""
    if not any(chosen.get(fmt) for fmt in DEFAULT_FORMATS):
        problem = f"no kernel runs {' or '.join(DEFAULT_FORMATS)} with {name} activations here"
    base, times = "", None
    if with_base and device == "cpu":
        try:
            base, times = _build_and_time(dtype, chosen)
        except Exception as e:  # whatever stops vLLM or us here stops a server
            problem = f"level 0 in {name} cannot be swapped: {type(e).__name__}: {e}"
    return DtypeReport(name, tuple(reports.values()), chosen, base, times, problem)


def _first(fmt: str, device: str, reports: dict[str, KernelReport]) -> str | None:
    return next((make.name for make in by_preference(fmt, device) if reports[make.name].ok), None)


def _build_and_time(dtype: torch.dtype, chosen: dict[str, str | None]) -> tuple[str, LayerTimes]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in _SHAPES.items()}
    formats: dict[str, dict[str, LinearImpl]] = {
        BASE_FORMAT: {name: base_linear(weight.clone()) for name, weight in weights.items()}
    }
    for fmt, kernel_name in chosen.items():
        for make in by_preference(fmt, "cpu"):
            if make.name == kernel_name:
                kernel = make(dtype)
                formats[fmt] = {name: kernel.build(kernel.pack(weight), None) for name, weight in weights.items()}
    times = time_layer(TimedLayer(formats, {name: k for name, (_, k) in _SHAPES.items()}, dtype))
    # vLLM chooses for each shape: where a CPU has AMX, small bf16 weights take another kernel than large ones.
    runs_in = {getattr(linear, "runs_in", "") for linear in formats[BASE_FORMAT].values()}
    return " and ".join(sorted(runs_in - {""})), times


def base_linear(weight: torch.Tensor) -> LinearImpl:
    """Return a linear without bias as level 0 runs it after it was swapped out and in again.

    Raises:
        ConfigError: it does not compute what it did before.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from morphserve.integration.worker.base_linear import UnquantizedBase

    num_outputs, num_inputs = weight.shape
    stored, x = weight.clone(), torch.linspace(-1, 1, 3 * num_inputs).reshape(3, -1).to(weight.dtype)
    method = UnquantizedLinearMethod()
    linear: Any = SimpleNamespace(
        weight=torch.nn.Parameter(weight, requires_grad=False), bias=None, skip_bias_add=False, prefix="check",
        quant_method=method, params_dtype=weight.dtype, output_size_per_partition=num_outputs,
        input_size_per_partition=num_inputs, output_size=num_outputs,
    )  # fmt: skip
    base = UnquantizedBase(linear)
    method.process_weights_after_loading(linear)
    with torch.inference_mode():
        before = base.take()(x)
        rebuilt = base.build({"weight": stored})
        if not torch.equal(rebuilt(x), before):
            raise ConfigError(
                f"vLLM's {weight.dtype} linear, rebuilt from its weight, computes something else. Serve in another "
                "--dtype, or without --plugin morphserve."
            )
    return rebuilt
