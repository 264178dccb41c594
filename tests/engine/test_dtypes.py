"""Every dtype that vLLM serves on this CPU, packed by oneDNN or kept as a tensor: swapped, and back as it was."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
from engine.harness import engine, follow, morph_of, settle, stock_later
from engine.rank_harness import CONFIG, NUM_LAYERS, PROMPTS, W4, W8, run

from morphserve.residence.host_memory import FREED_WEIGHTS_RETURN, resident_bytes
from quant_layers import trim

pytestmark = pytest.mark.cpu_tier

NUM_BLOCKS = 49
# The KV cache stays as it is, so that what a level frees shows in what is resident.
SETTINGS = {**CONFIG, "kv": {**CONFIG["kv"], "max_num_blocks": NUM_BLOCKS}}
PLAIN: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_batched_tokens": 1024, "enable_prefix_caching": False}
# Each of at most 12 tensors of a layer may leave its last page partly empty, the interpreter may open an arena (1 MiB),
# and the heap may keep what one layer's small tensors took.
SLACK_BYTES = NUM_LAYERS * 12 * mmap.PAGESIZE + (1 << 20) + 12 * (64 << 10)


def resident() -> int:
    trim()
    return resident_bytes()["anonymous"]


def go(llm: Any, level: int) -> None:
    follow(llm, {0: level})
    settle(llm, level)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_is_served_at_every_level(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    """Guards: a dtype without a kernel; a level that changes nothing; a weight that stays, or comes back another."""
    stock = stock_later(tiny_llama, [PROMPTS], dtype=dtype, **PLAIN)
    with engine(tiny_llama, tmp_path, SETTINGS, dtype=dtype, **PLAIN) as llm:
        ladder = morph_of(llm).runtime.ladder
        base = run(llm)
        seen = [base]
        for level, fmt in ((W8, "w8"), (W4, "w4")):
            go(llm, level)
            assert set(ladder[level].layer_formats) == {fmt}
            seen.append(run(llm))
            assert all(now[1] != then[1] for earlier in seen[:-1] for now, then in zip(seen[-1], earlier, strict=True))
        go(llm, 0)
        assert run(llm) == base
        assert morph_of(llm).controller.status()["layers_by_format"] == {"base": NUM_LAYERS}
        if FREED_WEIGHTS_RETURN:  # once more, now that each format's first steps have taken what they keep
            held = resident()
            for level in (W8, W4, 0):
                go(llm, level)
                freed = ladder[0].weight_bytes - ladder[level].weight_bytes
                assert abs(held - resident() - freed) <= SLACK_BYTES, (level, held - resident(), freed)
    assert base == stock.result()[0]
