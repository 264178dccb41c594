"""Our Triton kernel in Triton's interpreter, held to the self-test that every kernel must pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant_layers import QuantW4
from quant_layers.formats.packing import pack_w4_columns, unpack_w4_columns
from quant_layers.kernels.cpu import W4A16Triton

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


def test_the_kernel_computes_what_it_must() -> None:
    """Guards: nibbles, groups wider than a tile, tiles over the edge, bias; in bf16 and fp16."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "triton_probe.py"], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["self_tests"] == {"torch.bfloat16": [True, ""], "torch.float16": [True, ""]}
    assert len(found["errors"]) == 9 and max(found["errors"].values()) < 0.008


def test_layout_is_reversible() -> None:
    """Guards: a reference that shares the kernel's mistake."""
    q = torch.arange(16, dtype=torch.uint8).repeat(32, 4)
    quant = QuantW4(q, torch.rand(32, 2), torch.randint(0, 16, (32, 2), dtype=torch.uint8))
    packed = pack_w4_columns(quant)
    assert int(packed["weight"][0, 0]) & 0xFFFFFFFF == 0x76543210
    back = unpack_w4_columns(packed)
    assert torch.equal(back.q, q) and torch.equal(back.zero, quant.zero) and torch.equal(back.scale, quant.scale)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a compiler error at the first request."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in W4A16Triton(torch.bfloat16).unavailable()
