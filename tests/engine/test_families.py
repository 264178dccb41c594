"""Every supported family under a real engine: all layers into each format and back. Tiny, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.harness import engine, follow, generate, morph_of, settle
from engine.rank_harness import PROMPTS
from safetensors.torch import load_file

NUM_LAYERS = 4
CONFIG = {"ladder": {"steps": [{"format": fmt, "layers_per_level": NUM_LAYERS} for fmt in ("w8", "w4")]}}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def make_family(directory: Path, family: str) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.1, sliding_window=64 if "gemma" in family else None,
        tie_word_embeddings=family in ("llama", "gemma2", "gemma3_text"),
        **({"layer_types": ["sliding_attention", "full_attention"] * 2} if "gemma" in family else {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero from the start, so nothing would show whether they are added
            torch.nn.init.normal_(parameter, std=0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def distance(a: Any, b: Any) -> float:
    """Mean difference of the log probabilities of first tokens."""
    return sum(abs(x[1][0] - y[1][0]) for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_down_and_comes_back(family: str, tmp_path: Path, variant_cache: Path) -> None:
    """Guards: a bias, a norm or a fused linear of a family that is lost when its layers are swapped."""
    model = make_family(tmp_path / family, family)
    with engine(model, variant_cache, CONFIG, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
        base = generate(llm, PROMPTS[:4], 12)
        found = []
        for level in (1, 2, 0):
            follow(llm, {0: level})
            settle(llm, level)
            found.append(generate(llm, PROMPTS[:4], 12))
        w8, w4, restored = found
        assert restored == base
        assert 0 < distance(base, w8) < 0.15 and distance(base, w8) < distance(base, w4) < 2.0
        freed = morph_of(llm).runtime.ladder[0].weight_bytes - morph_of(llm).runtime.ladder[2].weight_bytes
        assert freed > 0.6 * morph_of(llm).runtime.ladder[0].weight_bytes


def test_halves_of_layers_are_swapped(tmp_path: Path, variant_cache: Path) -> None:
    """Guards: attention and MLP in each other's format, or memory counted for whole layers."""
    from quant_layers import ProfileLevel, base_fingerprint, write_profile

    model = make_family(tmp_path / "llama", "llama")
    tensors = load_file(model / "model.safetensors")
    norms = {
        name.removeprefix("model.layers."): t for name, t in tensors.items() if ".layers." in name and "norm" in name
    }
    attention = ProfileLevel(dict.fromkeys(range(NUM_LAYERS), "w4/base"), 0.1)
    mlp = ProfileLevel({**attention.layers, 0: "w4/w8", 1: "w4"}, 0.12)
    ladder = (ProfileLevel({}, 0.0), attention, mlp)
    write_profile(tmp_path / "profile", base_fingerprint(norms), {}, ladder, range(NUM_LAYERS), {}, {})
    config = {"profile": str(tmp_path / "profile")}
    with engine(model, variant_cache, config, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
        base = generate(llm, PROMPTS[:4], 12)
        found = []
        for level in (1, 2, 0):
            follow(llm, {0: level})
            settle(llm, level)
            memory = llm.collective_rpc("morphserve_memory")[0]
            assert memory["weight_bytes"] == morph_of(llm).controller.status()["ledger"]["weights_bytes"]
            found.append(generate(llm, PROMPTS[:4], 12))
        assert memory["formats"] == dict.fromkeys(range(NUM_LAYERS), "base")
        assert found[2] == base and found[0] != base and found[1] != found[0]
