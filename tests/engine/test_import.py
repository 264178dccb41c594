"""Somebody's quantized checkpoint as the source of a format: the same tokens as when vLLM serves it itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from engine.harness import engine, follow, generate, settle, stock
from engine.rank_harness import NUM_LAYERS, PROMPTS

# Level 1 may read what level 0 left in the prefix cache; static serving has no such thing.
PLAIN: dict[str, Any] = {"skip_tokenizer_init": True, "enable_prefix_caching": False}
# vLLM's kernels for these checkpoints on CPU: the weight-only one for 4 bits, oneDNN for int8.
VLLM_KERNELS = {"w4": "w4a16", "w8": "w8a8_onednn"}


def config(format: str, source: Path) -> dict[str, Any]:
    return {
        "ladder": {"steps": [{"format": format, "layers_per_level": NUM_LAYERS}]},
        "variants": {format: str(source)},
        "kernels": {format: VLLM_KERNELS[format]},
    }


@pytest.mark.parametrize(
    ("kind", "group_size"),
    [("gptq", 128), ("awq", 64), ("ct_w4_sym", 32), ("ct_w4_asym", 128), ("ct_int8", 0)],
)
def test_all_layers_swapped_give_the_tokens_of_static_serving(
    tiny_llama: Path, variant_cache: Path, tmp_path: Path, kind: str, group_size: int
) -> None:
    """Guards: a layout misread, halves of a fused linear in the wrong order, norms left behind."""
    checkpoint = write_checkpoint(tiny_llama, tmp_path / kind, kind, group_size)
    format = "w8" if kind == "ct_int8" else "w4"
    with engine(tiny_llama, variant_cache, config(format, checkpoint), **PLAIN) as llm:
        base = generate(llm, PROMPTS[:4], 24)
        follow(llm, {0: 1})
        settle(llm, 1)
        swapped = generate(llm, PROMPTS[:4], 24)
        follow(llm, {0: 0})
        settle(llm, 0)
        assert generate(llm, PROMPTS[:4], 24) == base
    assert swapped != base
    assert swapped == stock(checkpoint, [PROMPTS[:4]], 24, **PLAIN)[0]
