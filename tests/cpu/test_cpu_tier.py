"""A CPU's tier is what its instructions say, and a lower one can be emulated in a process that has not loaded torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from morphserve import cpu_tier
from morphserve.cpu_tier import TIERS, VARIABLE, best_dtype, is_emulated, machine_tier, tier, tier_of
from morphserve.errors import ConfigError

AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
VNNI = AVX512 | {"avx512_vnni"}
BF16 = VNNI | {"avx512_bf16"}
AMX = BF16 | {"amx_tile", "amx_int8", "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (frozenset({"sse4_2", "avx"}), None),
        (AVX2, "avx2"),
        (AVX512 - {"avx512bw"}, "avx2"),  # a part of AVX-512 is none that we compile for
        (AVX512, "avx512"),
        (VNNI, "vnni"),
        (BF16 - {"avx512_vnni"}, "avx512"),
        (BF16, "bf16"),
        (AMX, "amx"),
    ],
)
def test_a_tier_has_all_that_is_below_it(flags: frozenset[str], found: str | None) -> None:
    """Guards: a CPU that lacks one instruction of a tier is taken for one that has them all."""
    assert tier_of(flags) == found


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU of tier vnni, nothing emulated."""
    monkeypatch.setattr(cpu_tier, "_cpu_flags", lambda: VNNI)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delenv(VARIABLE, raising=False)


def test_what_is_emulated_counts(on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an emulated run that chooses by the machine it runs on."""
    assert tier() == "vnni" and not is_emulated()
    for name in ("avx2", "avx512"):
        monkeypatch.setenv(VARIABLE, name)
        assert tier() == name and machine_tier() == "vnni" and is_emulated()
    monkeypatch.setenv(VARIABLE, "")
    assert tier() == "vnni" and not is_emulated()


@pytest.mark.parametrize("wanted", ["bf16", "amx", "sse", "AVX2"])
def test_a_tier_above_the_machine_is_refused(on: None, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """Guards: figures of this machine under the name of a better one, or a typo that emulates nothing."""
    monkeypatch.setenv(VARIABLE, wanted)
    with pytest.raises(ConfigError, match="this CPU can be avx2, avx512, vnni. Give one"):
        tier()


def test_no_tier_beside_x86(on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an ARM machine that is told which AVX it has."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert tier() is None and best_dtype() == "bfloat16"
    monkeypatch.setenv(VARIABLE, "avx2")
    with pytest.raises(ConfigError, match="has none of them"):
        tier()


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [(AVX2, "float32"), (AVX512, "float32"), (VNNI, "float32"), (BF16, "bfloat16"), (AMX, "bfloat16")],
)
def test_bf16_is_served_where_the_cpu_multiplies_it(
    on: None, monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], dtype: str
) -> None:
    """Guards: a server four times slower than it need be."""
    monkeypatch.setattr(cpu_tier, "_cpu_flags", lambda: flags)
    assert best_dtype() == dtype


ASK = """
import json, os, sys
from morphserve.cpu_tier import emulate
emulate()
import torch
names = ("_is_avx2_supported", "_is_avx512_supported", "_is_vnni_supported", "_is_avx512_bf16_supported",
         "_is_amx_tile_supported")
json.dump({"has": [bool(getattr(torch.cpu, name)()) for name in names],
           "aten": torch.backends.cpu.get_cpu_capability(), "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA"),
           "fma3": torch.cpu.get_capabilities()["fma3"], "cache": os.environ.get("VLLM_CACHE_ROOT", "")}, sys.stdout)
"""


@pytest.mark.skipif(machine_tier() is None, reason="no x86-64 CPU with AVX2")
@pytest.mark.parametrize("wanted", TIERS[: TIERS.index(machine_tier() or "avx2")])
def test_a_process_of_a_lower_tier(wanted: str) -> None:
    """Guards: torch answering as the machine's own tier, from which vLLM would load the machine's own build."""
    env = {key: value for key, value in os.environ.items() if key != "VLLM_CACHE_ROOT"} | {VARIABLE: wanted}
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout)
    assert found["has"] == [name in TIERS[: TIERS.index(wanted) + 1] for name in TIERS]
    assert found["aten"] == ("AVX2" if wanted == "avx2" else "AVX512")
    assert found["onednn"].startswith("AVX2" if wanted == "avx2" else "AVX512_CORE")
    assert found["fma3"] is True and wanted in found["cache"]


def test_a_process_above_its_machine_ends() -> None:
    """Guards: a .pth line whose exception Python prints and forgets, so that the run goes on as something else."""
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, check=False, env=os.environ | {VARIABLE: "avx9"}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"{VARIABLE} is 'avx9'; tiers are avx2, avx512, vnni, bf16, amx")
