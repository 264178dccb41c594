"""Somebody's quantized checkpoint as the source of a format: the same tokens as when vLLM serves it itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import quantization_config, write_checkpoint
from engine.harness import engine, follow, generate, need_kernel, settle, stock, stock_later
from engine.rank_harness import NUM_LAYERS, PARALLEL, PROMPTS, needs_two_cores
from safetensors.torch import load_file, save_file

from morphserve.errors import ConfigError

# Level 1 may read what level 0 left in the prefix cache; static serving has no such thing.
PLAIN: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 512,  # all prompts in one step; see BATCH_TOKENS
    "dtype": "bfloat16",  # vLLM serves such checkpoints in no other, and in fp16
}
# vLLM's kernels for these checkpoints on CPU: the weight-only one for 4 bits, oneDNN for int8.
VLLM_KERNELS = {"w4": "w4a16", "w8": "w8a8_onednn"}


def config(format: str, source: Path) -> dict[str, Any]:
    """With the kernel that runs best here."""
    return {
        "ladder": {"steps": [{"format": format, "layers_per_level": NUM_LAYERS}]},
        "variants": {format: str(source)},
    }


def config_as_vllm(format: str, source: Path) -> dict[str, Any]:
    """With the kernel that vLLM itself takes: the same tokens. Skips the test where that does not run."""
    need_kernel(VLLM_KERNELS[format])
    return {**config(format, source), "kernels": {format: VLLM_KERNELS[format]}}


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
    settings = config_as_vllm(format, checkpoint)
    expected = stock_later(checkpoint, [PROMPTS[:4]], 24, **PLAIN)
    with engine(tiny_llama, variant_cache, settings, **PLAIN) as llm:
        base = generate(llm, PROMPTS[:4], 24)
        follow(llm, {0: 1})
        settle(llm, 1)
        swapped = generate(llm, PROMPTS[:4], 24)
        follow(llm, {0: 0})
        settle(llm, 0)
        assert generate(llm, PROMPTS[:4], 24) == base
    assert swapped != base
    assert swapped == expected.result()[0]


@needs_two_cores
@pytest.mark.usefixtures("two_cores")
def test_two_ranks_give_the_tokens_of_static_serving(tiny_llama: Path, tmp_path: Path) -> None:
    """Guards: slices cut through groups, or heads of the other rank."""
    checkpoint = write_checkpoint(tiny_llama, tmp_path / "awq", "awq", 128)
    parallel = {**PARALLEL, "enable_prefix_caching": False, "dtype": "bfloat16"}
    with engine(tiny_llama, tmp_path / "variants", config_as_vllm("w4", checkpoint), **parallel) as llm:
        follow(llm, {0: 1})
        settle(llm, 1)
        swapped = generate(llm, PROMPTS[:4], 24)
    assert swapped == stock(checkpoint, [PROMPTS[:4]], 24, **parallel)[0]


def other_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.1


def one_left_alone(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.3.mlp.up_proj"
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{part}"]
    tensors[f"{name}.weight"] = torch.zeros(1024, 512, dtype=torch.bfloat16)


def lacks_a_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.input_layernorm.weight"]


def stranger(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.extra.weight"] = torch.ones(4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_norm, "another model.norm.weight than the model .* made from other weights"),
        (one_left_alone, "layer 3: .* leaves a part of mlp.gate_up_proj unquantized"),
        (lacks_a_norm, "layer 2: .* lacks input_layernorm.weight"),
        (stranger, "layer 1: .* does not fit LlamaForCausalLM"),
    ],
)
def test_checkpoints_that_do_not_belong_are_refused(
    tiny_llama: Path, variant_cache: Path, tmp_path: Path, change: Any, words: str
) -> None:
    """Guards: layers of one model swapped into another."""
    checkpoint = write_checkpoint(tiny_llama, tmp_path / "gptq", "gptq", 64)
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(ConfigError, match=words),
        engine(tiny_llama, variant_cache, config("w4", checkpoint), **PLAIN),
    ):
        pass


def test_another_tokenizer_is_refused(demo_model: Path, variant_cache: Path, tmp_path: Path) -> None:
    """Guards: ids that mean other words in the checkpoint."""
    checkpoint = tmp_path / "other"
    shutil.copytree(demo_model, checkpoint)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((checkpoint / "config.json").read_text())
    settings["quantization_config"] = quantization_config("gptq", 64)
    (checkpoint / "config.json").write_text(json.dumps(settings))
    with (
        pytest.raises(ConfigError, match="another tokenizer than the model: 2 tokens differ"),
        engine(demo_model, variant_cache, config("w4", checkpoint)),
    ):
        pass
