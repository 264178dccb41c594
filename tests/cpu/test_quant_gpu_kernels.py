"""The kernels that run vLLM's operators on NVIDIA GPUs, on stand-ins for those: calls, choice, packing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_layers import (
    F8A8Cutlass,
    Kernel,
    KernelError,
    QuantW4,
    QuantW8,
    W4A16Machete,
    W4A16Marlin,
    W8A16Marlin,
    by_preference,
    check_kernel,
    choose,
    quantize_w4,
)
from quant_layers.formats import canonical
from quant_layers.formats.canonical import group_of_slice, round_in_pieces
from quant_layers.kernels import machete, selftest
from quant_layers.kernels.machete import MacheteLinear
from quant_layers.kernels.marlin import MarlinLinear
from quant_layers.sources.checkpoint import read_scheme
from quant_layers.sources.importers import Scheme
from tests import stand_in_ops
from tests.stand_in_ops import Refused, on_any_device, stand_in_operators

MAKES = (W4A16Machete, W4A16Marlin, W8A16Marlin, F8A8Cutlass)
N, K = 256, 384


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())  # vLLM's for CPU may be loaded
    with stand_in_operators():
        yield


def weight(n: int = N, k: int = K, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.05 + 0.02).to(dtype)


def made(make: type[Any], dtype: torch.dtype = torch.bfloat16) -> Kernel:
    kernel: Kernel = on_any_device(make)(dtype)  # type: ignore[call-arg]
    return kernel


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.name)
def test_the_operators_are_called_as_their_schema_says(make: type[Any], dtype: torch.dtype) -> None:
    """Guards: an argument of another type, shape or stride than the operator takes, or at another place."""
    report = check_kernel(made(make, dtype))
    assert report.ok, report.reason


def spoil(monkeypatch: pytest.MonkeyPatch, cls: type, change: Callable[[Any], None]) -> None:
    """Let `change` alter every linear after it was built."""
    original = cls.__init__

    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        change(self)

    monkeypatch.setattr(cls, "__init__", init)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (W4A16Machete, lambda linear: setattr(linear, "_zero", -linear._zero), "rounding explains"),
        (W4A16Machete, lambda linear: setattr(linear, "_zero", linear._zero.float()), "zeros torch.float32"),
        (W4A16Machete, lambda linear: setattr(linear, "_group_size", 128), "scales"),
        (W4A16Machete, lambda linear: setattr(linear, "_scale", linear._scale.t().contiguous().t()), "same layout"),
        (W4A16Marlin, lambda linear: setattr(linear, "_zero", None), "zero points belong to uint4"),
        (W8A16Marlin, lambda linear: setattr(linear, "_type", 1), "type 1"),
        (W8A16Marlin, lambda linear: setattr(linear, "_scale", linear._scale.roll(1, 1)), "rounding explains"),
        (W8A16Marlin, lambda linear: setattr(linear, "_weight", linear._weight.roll(1, 0)), "rounding explains"),
    ],
)  # fmt: skip
def test_a_wrong_call_does_not_pass_the_self_test(
    monkeypatch: pytest.MonkeyPatch, make: type[Any], change: Callable[[Any], None], reason: str
) -> None:
    """Guards: stand-ins that take anything, so that a call proves nothing."""
    spoil(monkeypatch, MacheteLinear if make is W4A16Machete else MarlinLinear, change)
    report = check_kernel(made(make))
    assert not report.ok and reason in report.reason


@pytest.mark.usefixtures("operators")
def test_machete_packs_column_by_column() -> None:
    """Guards: words that the real operator would read along the other side."""
    words = torch.zeros(K // 8, N, dtype=torch.int32)
    with pytest.raises(Refused, match="column by column"):
        torch.ops._C.machete_prepack_B(words, torch.bfloat16, (4 << 8) | (1 << 50), torch.bfloat16)
    assert made(W4A16Machete).pack(weight())["weight"].shape == words.shape


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("group_size", [64, 128])
def test_machete_takes_the_bytes_of_four_bits(group_size: int) -> None:
    """Guards: an image larger than the range that is laid out for it."""
    packed = made(W4A16Machete).pack_quant(quantize_w4(weight(), group_size, scale_dtype=torch.bfloat16))
    assert packed["weight"].nbytes == N * K // 2
    assert {name: t.dtype for name, t in packed.items()} == {
        "weight": torch.int32, "scale": torch.bfloat16, "zero": torch.bfloat16,
    }  # fmt: skip
    assert packed["scale"].shape == packed["zero"].shape == (K // group_size, N)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("make", [W4A16Machete, W4A16Marlin], ids=lambda make: make.name)
def test_a_row_may_be_one_group(make: type[Any]) -> None:
    """Guards: strides of a single row of scales, which the operator compares; scales of sums laid out as of groups."""
    kernel, x = made(make), torch.randn(3, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    packed = kernel.pack_quant(quantize_w4(weight(N, 128), 128, scale_dtype=torch.bfloat16))
    exact = x.double() @ kernel.reference(packed).double().t()
    assert (kernel.build(packed, None)(x).double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_machete_reads_back_through_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a reading that assumes an order of weights, and an operator that does more than to move them."""
    monkeypatch.setattr(stand_in_ops, "_order", lambda: torch.arange(8192).roll(77).flip(0))
    quant = quantize_w4(weight(), 64, scale_dtype=torch.bfloat16)
    with stand_in_operators():
        kernel = made(W4A16Machete)
        packed = kernel.pack_quant(quant)
        back = kernel.unpack(packed)
        assert isinstance(back, QuantW4) and torch.equal(back.q, quant.q) and torch.equal(back.zero, quant.zero)
        assert torch.equal(back.scale, quant.scale)
        monkeypatch.setattr(stand_in_ops, "_order", lambda: torch.arange(8192) // 2)  # half of the weights, twice
        with pytest.raises(KernelError, match="more to a weight .* than to move its values"):
            kernel.unpack(packed)


def test_without_its_operator_machete_says_so() -> None:
    """Guards: an AttributeError on a machine whose vLLM was built without it."""
    with pytest.raises(KernelError, match="machete_prepack_B is not loaded; load vLLM's extension"):
        made(W4A16Machete).pack(weight())


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that was allocated at a time beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    events: Any = profile.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        total += change
        peak = max(peak, total)
    del kept
    return peak


@pytest.fixture
def plain_prepack(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that takes its result's memory alone, as the real one; pieces are small beside 4096 x 4096."""
    monkeypatch.setattr(canonical, "_PIECE", canonical._PIECE // 8)
    monkeypatch.setattr(machete, "_PIECE", machete._PIECE // 8)
    monkeypatch.setattr("quant_layers.kernels.machete._op", lambda name: lambda words, *_: words.clone())


@pytest.mark.usefixtures("plain_prepack")
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.name)
def test_packing_a_large_linear_takes_less_than_its_layer_again(make: type[Any]) -> None:
    """Guards: a start that runs out of memory, because the largest linear was widened to fp32 as a whole.

    Of a Llama-8B layer gate_up is 54 %: 1.6 times its bf16 bytes, with what qkv and o were packed into, is less.
    """
    large = weight(4096, 4096)
    assert peak_bytes(lambda: made(make).pack(large)) < 1.6 * large.nbytes


@pytest.mark.usefixtures("plain_prepack")
def test_machete_lays_out_in_a_byte_a_weight() -> None:
    """Guards: words made of the whole weight at once, beside what the operator itself takes."""
    quant = quantize_w4(weight(4096, 4096), 64, scale_dtype=torch.bfloat16)
    assert peak_bytes(lambda: made(W4A16Machete).pack_quant(quant)) < 1.1 * quant.q.numel()


@pytest.mark.parametrize("format", ["w8", "w4", "fp8"])
def test_rounding_in_pieces_rounds_as_at_once(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a row that is lost or rounded with another's scale where two pieces meet."""
    form = selftest.FORMATS[format]
    whole = form.of(weight(), torch.bfloat16)
    monkeypatch.setattr(canonical, "_PIECE", 7 * K)
    pieces = round_in_pieces(form, weight(), torch.bfloat16)
    for name in ("q", "scale", *(["zero"] if format == "w4" else [])):
        ours, theirs = getattr(pieces, name), getattr(whole, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours.float(), theirs.float())


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A device of which nothing but this is known; no kernel's self-test is run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    def check(kernel: Kernel, device: str) -> selftest.KernelReport:
        reason = kernel.unavailable()
        return selftest.KernelReport(kernel.name, kernel.format, not reason, reason, 0.5)

    monkeypatch.setattr(selftest, "check_kernel", check)


@pytest.mark.usefixtures("operators")
def test_machete_then_marlin_then_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: Marlin on Hopper although Machete would do, Machete on any other GPU, and a start that ends because a
    weight does not fit the first."""
    assert [make.name for make in by_preference("w4", "cuda")][:2] == ["w4a16_machete", "w4a16_marlin"]
    assert by_preference("w8", "cuda")[0] is W8A16Marlin
    assert {make.name for make in by_preference("w4")[-3:-1]} == {"w4a16_machete", "w4a16_marlin"}
    assert by_preference("w4")[-1].name == "w4_plain"
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def name(**wanted: Any) -> str:
        return choose("w4", wanted.pop("dtype", torch.bfloat16), device="cuda", **wanted).name

    on_gpu(monkeypatch, (9, 0))
    assert name() == name(shapes=[(256, 384)], group_sizes=[64, 128]) == "w4a16_machete"
    assert name(dtype=torch.float16) == "w4a16_machete"
    assert name(shapes=[(320, 384)]) == "w4a16_marlin"  # N is no multiple of 128
    assert name(shapes=[(256, 384)], group_sizes=[32]) == "w4a16_marlin"
    with pytest.raises(KernelError, match=r"w4a16_machete: group size 32, it takes \(64, 128\)"):
        name(name="w4a16_machete", shapes=[(256, 384)], group_sizes=[32])
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        on_gpu(monkeypatch, capability)
        assert name() == "w4a16_marlin"
    on_gpu(monkeypatch, (7, 5))
    assert name(dtype=torch.float16) == "w4a16_marlin"
    assert "sm_80 or later" in W4A16Marlin(torch.bfloat16).unavailable()
    on_gpu(monkeypatch, (7, 0))
    assert "sm_75 or later" in W8A16Marlin(torch.float16).unavailable()
    pytest.importorskip("triton")
    assert name() == "w4a16_triton"
    on_gpu(monkeypatch, (9, 0))
    assert name(shapes=[(96, 96)]) == "w4a16_triton"


@pytest.mark.parametrize(
    ("size", "k", "group"), [(128, 4096, 128), (256, 4096, 128), (-1, 4096, 128), (128, 4160, 64), (32, 4096, 32),
                             (96, 4096, 32), (64, 48, 0), (40, 4000, 0)]
)  # fmt: skip
def test_a_slice_has_the_groups_that_regroup_finds(size: int, k: int, group: int) -> None:
    """Guards: a kernel chosen for groups that a tensor-parallel slice no longer has."""
    assert group_of_slice(size, k) == group
    if not group:
        return
    whole = 2 * k if size <= 0 else size * k  # a checkpoint of which `k` channels are one rank's
    number = torch.arange(whole) // (whole if size <= 0 else size)
    row = number[k : 2 * k].to(torch.uint8)[None]
    found = canonical.regroup(torch.zeros(1, k, dtype=torch.uint8), row.float(), row)
    assert found.group_size >= group and (size < 0 or found.group_size % group == 0)


CONFIGS: list[tuple[Mapping[str, Any], tuple[int, ...]]] = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 32}, (32,)),
    ({"quant_method": "gptq", "bits": 4, "group_size": -1}, (-1,)),
    ({"quant_method": "gptq", "bits": 4}, ()),
    ({"quant_method": "awq", "bits": 4, "q_group_size": 128}, (128,)),
    (
        {"quant_method": "compressed-tensors", "config_groups": {
            "a": {"weights": {"group_size": 128}}, "b": {"weights": {"group_size": None}}, "c": {"weights": None}}},
        (-1, 128),
    ),
    ({"quant_method": "compressed-tensors"}, ()),
]  # fmt: skip


@pytest.mark.parametrize(("config", "sizes"), CONFIGS)
def test_a_checkpoint_says_its_groups(config: Mapping[str, Any], sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Guards: Machete chosen for groups of 32, which shows when the first layer is packed; and variants on disk made
    anew, because what names them says more than before."""
    scheme = read_scheme(tmp_path, {"quantization_config": config})
    assert scheme.group_sizes == sizes
    assert repr(scheme) == repr(Scheme(scheme.method, scheme.bits, scheme.symmetric, scheme.zero_offset))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64}), encoding="utf-8")
    assert read_scheme(tmp_path, {}).group_sizes == (64,)


def test_w8_of_a_checkpoint_may_use_the_whole_byte() -> None:
    """Guards: -128, which rounding here never gives, read as 0 or as 127."""
    kernel = W8A16Marlin()
    q = torch.randint(-128, 128, (64, 128), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    quant = QuantW8(q, torch.rand(64, generator=torch.Generator().manual_seed(4)) + 0.1)
    back = kernel.unpack(kernel.pack_quant(quant))
    assert torch.equal(back.q, q) and int(q.min()) == -128
