"""`morphserve check` says whether a server could start here, and why not, without a model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("vllm._custom_ops")

import torch  # noqa: E402

from morphserve import cpu_tier  # noqa: E402
from morphserve.__main__ import main  # noqa: E402
from morphserve.control import DEFAULT_FORMATS  # noqa: E402
from morphserve.errors import ConfigError  # noqa: E402
from morphserve.integration import start
from morphserve.integration.offline import check, dtype_check
from morphserve.integration.offline.dtype_check import DTYPES, base_linear, check_dtype  # noqa: E402
from morphserve.integration.seams import SEAMS, Seam  # noqa: E402
from quant_layers import CANDIDATES, FORMATS, KernelError, KernelReport, choose  # noqa: E402

pytestmark = pytest.mark.cpu_tier

BATCHES = 3


def chosen_kernel(fmt: str, dtype: str) -> str | None:
    """What a server would choose."""
    try:
        return choose(fmt, getattr(torch, dtype)).name
    except KernelError:
        return None


def test_a_fresh_process_prints_one_document() -> None:
    """Guards: vLLM's log lines in front of the JSON, operators that nobody has loaded, rows or kernels left out,
    another kernel than a server would choose, a status that contradicts the document."""
    done = subprocess.run(
        [sys.executable, "-m", "morphserve", "check", "--json"], capture_output=True, text=True, check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "DEBUG"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"] and found["problems"] == [], done.stderr[-2000:]
    assert found["vllm"] == importlib.metadata.version("vllm") and found["device"] == "cpu"
    assert (found["tier"], found["machine_tier"]) == (cpu_tier.tier(), cpu_tier.machine_tier())
    assert found["emulated"] == cpu_tier.is_emulated()
    assert found["dtype"] == found["best_dtype"] == cpu_tier.best_dtype() and found["fastest_dtype"] in DTYPES
    assert {row["name"] for row in found["seams"] if row["holds"]} == {s.name for s in SEAMS} | {"version"}
    assert found["formats"] == {fmt: row["kernel"] for fmt, row in found["dtypes"][found["dtype"]]["formats"].items()}
    for dtype in DTYPES:
        row = found["dtypes"][dtype]
        assert [kernel["kernel"] for kernel in row["kernels"]] == [make.name for make in CANDIDATES]
        assert all(kernel["runs"] != bool(kernel["reason"]) for kernel in row["kernels"])
        assert {fmt: got["kernel"] for fmt, got in row["formats"].items()} == {
            fmt: chosen_kernel(fmt, dtype) for fmt in FORMATS
        }
        assert row["base"] and len(row["base_ms"]) == BATCHES and min(row["base_ms"]) > 0
        for got in row["formats"].values():
            assert len(got["time_over_base"]) == (BATCHES if got["kernel"] else 0)
            assert all(factor > 0 for factor in got["time_over_base"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_level_0_of_each_dtype_comes_back(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a dtype said to run whose base linear is another one after it was swapped out and in."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    x = torch.ones(2, 96, dtype=weight.dtype)
    expected = x.float() @ weight.float().t()
    with torch.inference_mode():
        found = base_linear(weight.clone())(x).float()
    assert torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    monkeypatch.setattr(torch, "equal", lambda *pair: False)
    monkeypatch.setattr(dtype_check, "probe", planted({"w8", "w4"}))
    problem = check_dtype(dtype).problem
    assert problem.startswith(f"level 0 in {dtype} cannot be swapped: ConfigError") and "something else" in problem


def test_a_level_0_of_two_kernels_is_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: 'can NOT run' where vLLM gives small linears another kernel than large ones, as it does with AMX."""

    class Linear:
        def __init__(self, weight: torch.Tensor) -> None:
            self.weight, self.runs_in = weight, "vLLM's own" if weight.nbytes <= 1 << 20 else "oneDNN"

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.t()

    monkeypatch.setattr(dtype_check, "base_linear", Linear)
    monkeypatch.setattr(dtype_check, "probe", planted(set()))
    monkeypatch.setattr(dtype_check, "DEFAULT_FORMATS", ())
    found = check_dtype("bfloat16")
    assert found.base == "oneDNN and vLLM's own" and found.times, found.problem


def planted(formats: set[str], dtypes: tuple[str, ...] = DTYPES) -> Any:
    """Reports in which exactly the first kernels of these formats run, with activations of these dtypes."""
    first = {fmt: next(make.name for make in CANDIDATES if make.format == fmt) for fmt in FORMATS}

    def probe(dtype: torch.dtype, device: str) -> dict[str, KernelReport]:
        found = {}
        for make in CANDIDATES:
            runs = make.format in formats and first[make.format] == make.name and str(dtype)[6:] in dtypes
            found[make.name] = KernelReport(make.name, make.format, runs, "" if runs else "no [vnni] unit", 0.5)
        return found

    return probe


Seconds = dict[str, float]  # dtype |-> level 0's


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    """No kernel is tested and no layer timed: w8 and w4 run, w8 in half of level 0's time and w4 in twice of it."""
    base_s = dict.fromkeys(DTYPES, 2e-3)

    def time(dtype: torch.dtype, chosen: dict[str, str | None]) -> Any:
        seconds = base_s[str(dtype)[6:]]
        times = {"base": seconds, "w8": seconds / 2, "w4": 2 * seconds, "fp8": 9 * seconds}
        return "oneDNN", {fmt: ((s / 4, s * 3 / 4),) * BATCHES for fmt, s in times.items() if chosen.get(fmt, True)}

    monkeypatch.setattr(dtype_check, "probe", planted({"w8", "w4"}))
    monkeypatch.setattr(dtype_check, "by_preference", lambda fmt, _: [k for k in CANDIDATES if k.format == fmt])
    monkeypatch.setattr(dtype_check, "_build_and_time", time)
    return base_s


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    status = main(["check", *arguments])
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("quick")
def test_the_text_says_what_runs_how_fast_and_why_another_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a reason or a figure that stands in another row, or a default that is not the one a server would take."""
    status, lines = text(capsys, "--dtype", "float16")
    assert status == 0
    assert any("tier" in line and str(cpu_tier.tier()) in line for line in lines[:2])
    start = next(i for i, line in enumerate(lines) if line.startswith("  float16"))
    assert lines[start].split()[:4] == ["float16", "base", "oneDNN", "1"] and "(2.00, 2.00, 2.00 ms)" in lines[start]
    assert lines[start + 1].split() == ["w8", "w8a8_vnni", "0.50,", "0.50,", "0.50"]
    assert lines[start + 2].split() == ["w4", "w4a8_vnni", "2.00,", "2.00,", "2.00"]
    assert "Kernels for float16 activations:" in lines
    (vnni,) = (line for line in lines if line.split()[:3] == ["w8", "w8a8_vnni", "yes,"])
    assert vnni.split()[2:] == ["yes,", "by", "default"]
    (onednn,) = (line for line in lines if "w8a8_onednn" in line)
    assert onednn.split() == ["w8", "w8a8_onednn", "no", "no", "[vnni]", "unit"]
    assert "MorphServe can run here in float16, with formats w8, w4." in lines


def refuse_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConfigError("device 'tpu': not served")

    monkeypatch.setattr(start, "check_platform", refuse)


def take_vllm_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(check.importlib.metadata, "version", absent)


def move_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Seam("moved", "vllm.config:NoSuchClass", (), "test")
    monkeypatch.setattr("morphserve.integration.seams.check.SEAMS", (*SEAMS, row))


def fail_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype_check, "probe", planted({"fp8"}))


def fail_level_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no matmul")

    monkeypatch.setattr(dtype_check, "_build_and_time", fail)


def ask_for_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_tier.VARIABLE, "avx1024")


def another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (refuse_device, "device 'tpu'"),
        (take_vllm_away, "vLLM is not installed"),
        (move_a_seam, "1 of "),
        (fail_all_kernels, "no kernel runs w8 or w4 with float32"),
        (fail_level_0, "level 0 in float32 cannot be swapped: RuntimeError: no matmul"),
        (ask_for_too_much, "MORPHSERVE_CPU_TIER is 'avx1024'; tiers are"),
        (another_processor, "this CPU (aarch64) is no x86-64 with AVX2"),
    ],
)
def test_what_stops_a_server_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plant: Any, said: str
) -> None:
    """Guards: exit status 0, or a traceback, where a server would refuse to start."""
    plant(monkeypatch)
    assert main(["check", "--json", "--dtype", "float32"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    (problem,) = found["problems"]
    assert said in problem
    status, lines = text(capsys, "--dtype", "float32")
    assert status == 1 and lines[-1].startswith(f"MorphServe can NOT run here in float32: {problem}.")


@pytest.mark.usefixtures("quick")
def test_the_dtype_that_is_asked_about_decides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: status 0 because another dtype would start, or no word of the one that would."""
    monkeypatch.setattr(dtype_check, "probe", planted({"w8", "w4"}, ("bfloat16",)))
    status, lines = text(capsys, "--dtype", "float16")
    assert status == 1 and lines[-1].endswith("With --dtype bfloat16 it can.")
    assert text(capsys, "--dtype", "bfloat16")[0] == 0


@pytest.mark.parametrize(("tier", "dtype"), [("avx2", "float32"), ("vnni", "float32"), ("bf16", "bfloat16")])
def test_the_dtype_to_serve_is_said_and_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: Seconds, tier: str, dtype: str
) -> None:
    """Guards: advice for another tier, and advice that what was measured contradicts, unsaid."""
    monkeypatch.setattr(cpu_tier, "tier", lambda: tier)
    status, lines = text(capsys)
    assert status == 0 and any(line.startswith(f"MorphServe can run here in {dtype},") for line in lines)
    assert any(line.startswith("Serve with --dtype float32") for line in lines) == (dtype == "float32")
    assert not any("Measured just now" in line for line in lines)
    quick["float16"] = 1e-3
    (warning,) = (line for line in text(capsys)[1] if "Measured just now" in line)
    assert f"level 0 in float16 was 2.0 times as fast as in {dtype} at a batch of 32" in warning


@pytest.mark.usefixtures("quick")
def test_an_emulated_tier_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: figures of an emulated tier taken for the machine's."""
    monkeypatch.setattr(cpu_tier, "machine_tier", lambda: "amx")
    monkeypatch.setenv(cpu_tier.VARIABLE, "avx2")
    assert text(capsys)[1][1].endswith("tier avx2, emulated by MORPHSERVE_CPU_TIER: the CPU has amx")
    monkeypatch.delenv(cpu_tier.VARIABLE)
    assert text(capsys)[1][1].endswith("tier amx")


@pytest.mark.usefixtures("quick")
def test_a_format_of_the_default_ladder_without_a_kernel_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: `can run`, and then the default ladder is another one without a word."""
    monkeypatch.setattr(dtype_check, "probe", planted({"w8"}))
    status, lines = text(capsys)
    assert status == 0
    assert any(line.endswith("with formats w8. The default ladder does without w4.") for line in lines)
    assert set(DEFAULT_FORMATS) == {"w8", "w4"}


def test_it_runs_with_what_the_base_install_brings() -> None:
    """Guards: a command that needs a package of some extra, on a machine that just serves."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'aiohttp', 'matplotlib'))); "
        "import morphserve.integration.offline.check, morphserve.integration.offline.check_report"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
