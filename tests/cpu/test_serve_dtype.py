"""Which dtype servers run in: the machine's best, said once, and what the user asked for."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu.test_replay_compare import FAKE, comparison
from cpu.test_step_times import TIMES

from morphserve import cpu_tier, serve_dtype
from morphserve.serve_dtype import main, model_dtype, resolve_dtype
from morphserve.tools.bench.cli import settle_dtype
from morphserve.tools.bench.options import build_parser
from morphserve.tools.workload import ReplayError
from policies import load_step_times


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the machine's tier; vLLM is the CPU build."""

    def be(name: str) -> None:
        monkeypatch.delenv(cpu_tier.VARIABLE, raising=False)
        monkeypatch.setattr(cpu_tier, "machine_tier", lambda: name)

    monkeypatch.setattr(serve_dtype, "_runs_on_cpu", lambda: True)
    return be


@pytest.mark.parametrize(
    ("name", "best"), [("avx2", "float32"), ("avx512", "float32"), ("vnni", "float32"), ("bf16", None), ("amx", None)]
)
def test_auto_is_fp32_without_bf16_instructions(
    tier: Any, capsys: pytest.CaptureFixture[str], name: str, best: str | None
) -> None:
    """Guards: bf16 emulated at a quarter of the speed, or a machine with the instructions that does not use them."""
    tier(name)
    assert resolve_dtype("auto", None) == best
    err = capsys.readouterr().err
    assert err.count("\n") == (1 if best else 0), "one line, and only where something is decided"
    assert not best or (f"tier {name}" in err and "--dtype bfloat16" in err)
    assert resolve_dtype("bfloat16", None) == "bfloat16" and not capsys.readouterr().err


def test_a_gpu_build_keeps_the_models_own(tier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: fp32 on a GPU because its host's CPU is old."""
    tier("avx2")
    monkeypatch.setattr(serve_dtype, "_runs_on_cpu", lambda: False)
    assert resolve_dtype("auto", None) is None


INT8 = {"num_bits": 8, "type": "int"}
INT4 = {"num_bits": 4, "type": "int"}


def groups(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    """A compressed-tensors config: (weights, input activations) of each group."""
    found = {f"group_{i}": {"weights": weights, "input_activations": x} for i, (weights, x) in enumerate(pairs)}
    return {"quant_method": "compressed-tensors", "config_groups": found}


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (None, "float32"),
        ({"quant_method": "awq", "bits": 4}, None),
        ({"quant_method": "gptq", "bits": 8}, None),
        (groups((INT8, INT8)), "float32"),
        (groups((INT8, INT8), (INT4, None)), None),
        (groups((INT8, None)), None),
        (groups(), None),
        ("damaged", None),
    ],
)
def test_a_quantized_model_keeps_its_own(
    tier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], quantization: Any, dtype: str | None
) -> None:
    """Guards: vLLM refusing to start because it serves AWQ, GPTQ and 4 bits in 16-bit activations only."""
    tier("avx2")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    assert resolve_dtype("auto", str(tmp_path)) == dtype
    assert bool(capsys.readouterr().err) is (dtype is not None)
    assert main(["auto", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (f"--dtype {dtype}\n" if dtype else "\n")
    args = args_of(tmp_path, "--model", str(tmp_path))
    settle_dtype(args)
    assert args.dtype == dtype
    assert resolve_dtype("auto", "hub/name") == "float32" and resolve_dtype("float32", str(tmp_path)) == "float32"


def test_arguments_for_vllm_serve(
    tier: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: `make serve` starting in another dtype than `make demo`, or going on with a tier that is none."""
    tier("vnni")
    assert main(["auto"]) == 0 and capsys.readouterr().out == "--dtype float32\n"
    tier("bf16")
    assert main([]) == 0 and capsys.readouterr().out == "\n"
    monkeypatch.setenv(cpu_tier.VARIABLE, "amx")
    assert main([]) == 2 and "amx" in capsys.readouterr().err


def test_every_server_gets_it(tier: Any) -> None:
    """Guards: stock compared in another dtype."""
    assert "--dtype" not in FAKE.arguments(1, ())
    words = replace(FAKE, dtype="float32").arguments(1, ("--plugin", "morphserve"))
    assert words[words.index("--dtype") + 1] == "float32"


def args_of(tmp_path: Path, *more: str) -> argparse.Namespace:
    return build_parser("", tmp_path).parse_args(["--workload", "w.jsonl", *more])


@pytest.mark.parametrize(
    ("more", "dtype"),
    [
        ((), "float32"),
        (("--dtype", "bfloat16"), "bfloat16"),
        (("--serve-arg=--dtype=half",), None),
        (("--url", "http://there"), None),
        (("--simulate",), None),
    ],
)
def test_what_is_settled(
    tier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], dtype: str | None
) -> None:
    """Guards: a line about servers that are not started, or an argument of the user's overruled."""
    tier("avx2")
    args = args_of(tmp_path, *more)
    settle_dtype(args)
    assert args.dtype == dtype
    assert bool(capsys.readouterr().err) is (more == ())


@pytest.mark.parametrize("more", [("--url", "http://there"), ("--simulate",), ("--serve-arg=--dtype=half",)])
def test_a_dtype_that_nobody_gets_is_refused(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Guards: an option that is ignored without a word."""
    with pytest.raises(ReplayError, match="--dtype float32: .*Leave one out"):
        settle_dtype(args_of(tmp_path, "--dtype", "float32", *more))


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float16"}, "float16"), ({}, None), ([], None)],
)
def test_a_models_own_dtype_is_read(tmp_path: Path, raw: object, dtype: str | None) -> None:
    """Guards: a report that says nothing of the dtype, or fails on a model without one."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert model_dtype(str(tmp_path)) == dtype


@pytest.mark.parametrize(("dtype", "of", "warns"), [("float32", "float32", False), ("float32", "bfloat16", True)])
def test_step_times_of_another_dtype_are_pointed_out(
    tier: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, of: str, warns: bool
) -> None:
    """Guards: promises predicted with the step times of another dtype, and nobody told."""
    tier("vnni")
    (tmp_path / "times.json").write_text(json.dumps(replace(TIMES, dtype=of, tier="vnni").document()))
    assert load_step_times(tmp_path / "times.json").dtype == of
    asked = comparison(tmp_path, "morphserve", server=replace(FAKE, dtype=dtype))
    assert asked.config is not None
    asked.config.write_text(f"policy: {{kind: slo}}\nstep_times: {tmp_path}/times.json\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        asked.check()
    assert [r.getMessage().count("\n") for r in caplog.records] == ([0] if warns else [])
    assert not warns or "of bfloat16 on tier vnni, the servers run float32 on tier vnni" in caplog.text
