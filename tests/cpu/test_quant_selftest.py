"""The self-test is what stands between a wrong kernel and a user: it must fail for each kind of wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from quant_layers import Kernel, KernelError, LinearImpl, check_kernel, choose, probe
from quant_layers.formats.packing import unpack_w4_vnni
from quant_layers.kernels import base as kernel_base
from quant_layers.kernels import int16, selftest
from quant_layers.kernels.cpu import W4A8Vnni, W8A8Vnni
from quant_layers.kernels.int16 import W4Int16, W8Int16
from quant_layers.kernels.plain import W4Plain, W8Plain

Twist = Callable[[Tensor, Tensor], Tensor]  # (x [..., K], honest output [..., N]) -> output


class _Linear:
    """Computes in float64 what the packed tensors mean, then lets `twist` spoil it."""

    def __init__(self, meaning: Tensor, bias: Tensor | None, twist: Twist | None) -> None:
        self.meaning, self.bias, self.twist = meaning.double(), bias, twist
        self.nbytes = 0

    def __call__(self, x: Tensor) -> Tensor:
        out = x.double() @ self.meaning.t()
        if self.bias is not None:
            out = out + self.bias.double()
        out = out.to(x.dtype)
        return out if self.twist is None else self.twist(x, out)


class _FakeW8(W8A8Vnni):
    twist: Twist | None = None

    def unavailable(self) -> str:
        return ""

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return _Linear(self.reference(tensors), bias, type(self).twist)


def _spoiled(twist: Twist) -> type[_FakeW8]:
    return type("_Spoiled", (_FakeW8,), {"twist": staticmethod(twist)})


def test_an_exact_kernel_passes() -> None:
    """Guards against a self-test that refuses everything."""
    report = check_kernel(_FakeW8())
    assert report.ok and report.reason == "" and report.worst_error <= 1


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        (lambda x, out: out * 1.1, "times what rounding explains"),
        (lambda x, out: out.roll(1, -1), "times what rounding explains"),
        (lambda x, out: out + x.abs().amax(-1, keepdim=True) * 0.2, "times what rounding explains"),
        (lambda x, out: out.float(), "returned torch.float32"),
        (lambda x, out: out[..., :-1], "expected torch.bfloat16"),
        (lambda x, out: torch.where(x.abs().amax(-1, keepdim=True) == 0, math.nan, out), "not finite"),
        (lambda x, out: out if x.dim() == 2 else out.roll(1, 0), "give another result"),
        (lambda x, out: out if x.is_contiguous() else out * 2, "strided rows give another result"),
        (lambda x, out: out if x.numel() else out.new_empty(3), "empty batch"),
        (lambda x, out: out if x.shape[0] != 17 else out * 1.2, "times what rounding explains"),
    ],
    ids=["scale", "channels", "offset", "dtype", "shape", "zero-row", "3d", "strided", "empty", "m17"],
)
def test_each_kind_of_wrong_is_caught(twist: Twist, reason: str) -> None:
    """Guards against serving wrong numbers: each twist is a fault that a kernel could have."""
    report = check_kernel(_spoiled(twist)())
    assert not report.ok
    assert reason in report.reason


def test_a_kernel_that_ignores_the_bias_is_caught() -> None:
    """Guards against a self-test that never passes a bias."""

    class NoBias(_FakeW8):
        def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
            return super().build(tensors, None)

    assert "rounding explains" in check_kernel(NoBias()).reason


def test_a_kernel_that_ignores_zero_points_is_caught() -> None:
    """Guards against the one fault that symmetric test weights would hide."""

    class NoZeros(W4A8Vnni):
        def unavailable(self) -> str:
            return ""

        def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
            quant = unpack_w4_vnni(dict(tensors))
            quant.zero.fill_(8)
            return _Linear(quant.dequantize(), bias, None)

    assert "rounding explains" in check_kernel(NoZeros()).reason


def test_a_packing_that_means_other_weights_is_caught() -> None:
    """Guards against a kernel and a reference that agree with each other but not with the weight."""

    class Wrong(_FakeW8):
        def pack(self, weight: Tensor) -> dict[str, Tensor]:
            return super().pack(weight.roll(1, 1))

    assert "rounding explains" in check_kernel(Wrong()).reason


class _Fp32(_FakeW8):
    _dtypes = (torch.float32,)


def _fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _in_turn(x: Tensor, weight: Tensor) -> Tensor:
    """One product after the other: the order of summation that errs most."""
    total = torch.zeros(*x.shape[:-1], len(weight))
    for k in range(x.shape[-1]):
        total += x[..., k, None] * weight[:, k]
    return total


def _saturated(x: Tensor, weight: Tensor) -> Tensor:
    """Sums of pairs of 8-bit products held in int16, as oneDNN does without VNNI: activations in 0..255."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    steps = weight.abs().amax(1, keepdim=True) / 127
    q, w = (x / scale).round() + 128, (weight / steps).round()
    pairs = q.unsqueeze(-2) * w
    sums = pairs.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * w.sum(-1)
    return sums * scale * steps.squeeze(1)


def _fp32(run: Callable[[Tensor, Tensor], Tensor]) -> type[_Fp32]:
    class Kernel(_Fp32):
        def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
            weight = self.reference(tensors)
            impl = _Linear(weight, None, lambda x, out: run(x, weight) + (0 if bias is None else bias))
            return impl

        def activation_half_step(self, x: Tensor) -> Tensor:
            return super().activation_half_step(x) * (run is _saturated)

    return Kernel


@pytest.mark.parametrize("run", [_fp32_linear, _in_turn])
def test_fp32_sums_pass_in_any_order(run: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Guards: a bound for fp32 outputs that only the exactly rounded result keeps."""
    report = check_kernel(_fp32(run)(torch.float32))
    assert report.ok, report.reason


@pytest.mark.parametrize(
    "run",
    [
        _saturated,
        lambda x, weight: _fp32_linear(x.bfloat16().float(), weight),
        lambda x, weight: _fp32_linear(x, weight.bfloat16().float()),
        lambda x, weight: _fp32_linear(x, weight) * (1 + 2**-15),
    ],
    ids=["saturating", "bf16-activations", "bf16-weights", "scale"],
)
def test_fp32_kernels_that_lose_more_than_summing_does_are_caught(run: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Guards: a term for summation so wide that it hides a kernel which computes in fewer bits than it says."""
    assert "times what rounding explains" in check_kernel(_fp32(run)(torch.float32)).reason


def test_a_raising_kernel_becomes_a_report() -> None:
    """Guards against a start-up that dies on an exception inside a kernel it would not have used."""

    def explode(x: Tensor, out: Tensor) -> Tensor:
        raise ValueError("boom")

    report = check_kernel(_spoiled(explode)())
    assert not report.ok and "ValueError: boom" in report.reason and math.isnan(report.worst_error)


def test_without_vllm_every_kernel_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an AttributeError where vLLM's extension is not loaded, and a format that then has no kernel."""
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())
    monkeypatch.setattr(int16, "load", lambda: "cannot be compiled on this CPU")
    reports = probe(torch.bfloat16)
    of_torch = {"w8a16_aten", "w8_plain", "w4_plain", "fp8_torch", "fp8a16"}
    of_ours = {"w8_int16", "w4_int16"}
    of_cuda = {"w4a16_machete", "w4a16_marlin", "w8a16_marlin", "fp8_cutlass"}
    of_vllm = {"w8a8_vnni", "w8a8_onednn", "w4a8_vnni", "w4a16", "w4a16_triton"}
    assert set(reports) == of_vllm | of_ours | of_cuda | of_torch
    assert {name for name, report in reports.items() if report.ok} == of_torch
    for name, report in reports.items():
        assert name in of_torch or any(word in report.reason for word in ("not loaded", "CPU", "GPU")), name
    assert choose("w8", torch.float32).name == "w8_plain" and choose("w4").name == "w4_plain"
    monkeypatch.setattr(kernel_base.KernelBase, "unavailable", lambda self: "broken")
    with pytest.raises(KernelError, match="w4a8_vnni: .*w4_int16: .*w4a16: .*w4_plain: .*remove w4"):
        choose("w4")
    with pytest.raises(KernelError, match="no kernel can run w8 .*w8a8_vnni"):
        choose("w8", name="w8a8_vnni")
    with pytest.raises(KernelError, match="unknown kernel 'w8a9' for w8; known are w8a8_vnni, w8_int16, .* w8_plain"):
        choose("w8", name="w8a9")


def test_choose_takes_the_first_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a fall-back that is never reached, or that is preferred."""
    bad, good = _spoiled(lambda x, out: -out), type("_Good", (_FakeW8,), {"name": "good"})
    late = type("_Late", (_FakeW8,), {"name": "late"})
    monkeypatch.setattr(selftest, "CANDIDATES", (bad, good, late))
    assert choose("w8").name == "good"
    slow = type("_Slow", (_FakeW8,), {"name": "slow", "slow_on": ("cpu",)})
    monkeypatch.setattr(selftest, "CANDIDATES", (slow, good))
    assert choose("w8").name == "good" and choose("w8", name="slow").name == "slow"
    monkeypatch.setattr(selftest, "CANDIDATES", (slow, bad))
    assert choose("w8").name == "slow"
    monkeypatch.setattr(selftest, "CANDIDATES", (bad,))
    with pytest.raises(KernelError, match="no kernel can run w8 .*w8a8_vnni: self-test error is"):
        choose("w8")
    with pytest.raises(KernelError, match="unknown format 'w3'; known are w8, w4, fp8"):
        choose("w3")


@pytest.mark.parametrize("make", [W8Int16, W4Int16, W8Plain, W4Plain], ids=lambda make: make.name)
def test_a_kernel_for_cpus_is_refused_by_device(make: type[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: twenty seconds of g++ to learn that a GPU is no CPU, and plain torch served on one."""
    monkeypatch.setattr(int16, "load", lambda: pytest.fail("the operators were compiled"))
    report = check_kernel(make(torch.bfloat16), "cuda")  # type: ignore[call-arg]
    assert report.reason == "needs a cpu device, not cuda"


def test_a_format_that_is_slow_here_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: a machine without g++ that serves many times slower, and nobody knows why."""
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())
    monkeypatch.setattr(int16, "load", lambda: "cannot be compiled here: no C++ compiler: install g++")
    monkeypatch.setattr(selftest, "_warned", set())
    with caplog.at_level(logging.WARNING):
        choose("w4", name="w4_plain")  # as the user wanted it
        assert not caplog.records
        for _ in range(2):
            assert choose("w4", torch.float32).name == "w4_plain"
        choose("w8", torch.float32)
    four, eight = (record.getMessage() for record in caplog.records)
    assert "w4 is slow here: it runs as w4_plain" in four and "install g++" in four
    assert "w8 is slow here: it runs as w8_plain" in eight and "install g++" in eight


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    """Guards against a C++ abort: sizes and dtypes are checked before any operator sees them."""
    kernel = W8A8Vnni(torch.bfloat16)
    with pytest.raises(KernelError, match=r"w8a8_vnni: N=48 .*multiple of 32"):
        kernel.check_shape(48, 64)
    with pytest.raises(KernelError, match=r"K=40 .*\[N=64, K=40\]"):
        kernel.pack(torch.zeros(64, 40, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match="got torch.float16"):
        kernel.pack(torch.zeros(64, 64, dtype=torch.float16))
    assert "takes bfloat16" in W8A8Vnni(torch.float16).unavailable()


def test_a_cpu_without_the_instructions_is_never_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against running an operator that ends the process on a CPU it was not compiled for."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(W8A8Vnni, "pack", lambda *_: pytest.fail("the kernel was run"))
    assert "AVX512-VNNI" in check_kernel(W8A8Vnni()).reason
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "this is aarch64" in W4A8Vnni().unavailable()
