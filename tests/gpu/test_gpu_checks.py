"""The parts of scripts/gpu_check.py that need no vLLM, on a device: each must meet its own pass criteria."""

from __future__ import annotations

import pytest
import torch

from morphserve.tools.gpucheck.frame import Options, run_one
from morphserve.tools.gpucheck.parts import PARTS, Part

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False here")

WITHOUT_VLLM = PARTS[:7]


@pytest.mark.parametrize("part", WITHOUT_VLLM, ids=[part.key for part in WITHOUT_VLLM])
def test_pass_criteria_hold(part: Part) -> None:
    """Guards: a driver, a torch or a Triton under which the NVIDIA path computes something else, or not at all."""
    result = run_one(part, Options("cuda"), part.budget_s)
    if result.status == "skipped":
        pytest.skip(result.reason)
    assert result.status == "ok", f"{result.reason}\n{result.output_tail}"
