"""vLLM's own growth of the KV cache is taken where it is, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from morphserve.integration.worker.kv_growth import ExtendedByVllm, growth_of, vllm_extends


def ours(num_mapped: int) -> SimpleNamespace:
    return SimpleNamespace(num_mapped=num_mapped, map=lambda num_blocks: None)


def test_todays_vllm_does_not_extend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a new vLLM whose growth goes unnoticed: this fails when it has come. Then wire it."""
    assert not vllm_extends()
    growth = ours(5)
    assert growth_of(SimpleNamespace(), growth) is growth
    monkeypatch.setattr(GPUModelRunner, "extend_kv_cache", lambda self, num_blocks: None, raising=False)
    assert vllm_extends()


def test_a_runner_that_extends_is_asked_to() -> None:
    """Guards against asking for fewer blocks than there are, and against counting blocks that were refused."""
    asked: list[int] = []

    def extend(num_blocks: int) -> None:
        asked.append(num_blocks)
        if num_blocks > 20:
            raise MemoryError("no pages")

    growth = growth_of(SimpleNamespace(extend_kv_cache=extend), ours(5))
    assert isinstance(growth, ExtendedByVllm) and growth.num_mapped == 5
    for num_blocks in (4, 5, 12, 21, 12):
        growth.map(num_blocks)
    assert asked == [12, 21] and growth.num_mapped == 12
