"""Two pipeline stages whose variants are not rounded to nearest: each stage knows only its own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from engine.harness import engine, generate, morph_of, stock_later
from engine.rank_harness import NUM_LAYERS, PROMPTS, go, needs_two_cores, run
from engine.test_import import config_as_vllm
from engine.test_pipeline import STAGES
from levels import swapped_layers
from safetensors.torch import load_file

from quant_layers import ProfileLevel, base_fingerprint, write_profile

pytestmark = [needs_two_cores, pytest.mark.usefixtures("two_cores")]

UNCACHED = {**STAGES, "enable_prefix_caching": False}


def test_a_checkpoint_gives_the_tokens_of_static_serving(tiny_llama: Path, tmp_path: Path) -> None:
    """Guards: a stage that misses what the other has, or takes another layer's weights."""
    checkpoint = write_checkpoint(tiny_llama, tmp_path / "awq", "awq", 128)
    settings, of_vllm = config_as_vllm("w4", checkpoint), {**UNCACHED, "dtype": "bfloat16"}
    expected = stock_later(checkpoint, [PROMPTS[:4]], 24, **of_vllm)
    with engine(tiny_llama, tmp_path / "variants", settings, **of_vllm) as llm:
        go(llm, 1)
        swapped = generate(llm, PROMPTS[:4], 24)
    assert swapped == expected.result()[0]


def norms_of(model: Path) -> Any:
    tensors = load_file(model / "model.safetensors")
    return {
        name.removeprefix("model.layers."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.layers.") and name.endswith("layernorm.weight")
    }


def test_a_profile_is_known_by_the_norms_of_all_stages(tiny_llama: Path, tmp_path: Path) -> None:
    """Guards: a profile of this very model, refused because a stage has the norms of its own layers only."""
    order = [5, 0, 4, 1, 3, 2]
    levels = tuple(ProfileLevel({layer: "w8" for layer in order[:count]}, 0.01 * count) for count in (0, 2, 4, 6))
    profile = tmp_path / "profile"
    write_profile(profile, base_fingerprint(norms_of(tiny_llama)), {}, levels, order, {}, {})
    with engine(tiny_llama, tmp_path / "variants", {"profile": str(profile)}, **UNCACHED) as llm:
        ladder = morph_of(llm).runtime.ladder
        assert [swapped_layers(level) for level in ladder] == [tuple(sorted(level.layers)) for level in levels]
        base = run(llm, PROMPTS[:4])
        go(llm, 3)
        assert morph_of(llm).pool.num_kv_blocks == ladder[3].num_kv_blocks > 49
        assert run(llm, PROMPTS[:4]) != base
        go(llm, 0)
        assert run(llm, PROMPTS[:4]) == base
    assert len(order) == NUM_LAYERS
