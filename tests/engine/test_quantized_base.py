"""Models whose own weights are quantized: level 0 is what stock vLLM serves, and 4 bits free what is announced."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from engine.harness import engine, follow, generate, morph_of, need_kernel, settle, stock_later
from engine.rank_harness import NUM_LAYERS, PARALLEL, PROMPTS, needs_two_cores

from morphserve.errors import ConfigError
from morphserve.integration.worker import keeps_weights
from morphserve.integration.worker.ops import opaque_linear
from morphserve.residence.host_memory import FREED_WEIGHTS_RETURN, resident_bytes
from quant_layers import trim, write_profile

# Level 1 may read what level 0 left in the prefix cache; stock serving has no such thing.
PLAIN: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 512,  # all prompts in one step; see BATCH_TOKENS
}
IN_BF16 = {"dtype": "bfloat16"}  # vLLM serves 4-bit checkpoints in no wider one
HEAP_NOISE_BYTES = 8 << 20


def all_layers(format: str, **others: Any) -> dict[str, Any]:
    """A ladder of two levels."""
    return {"ladder": {"steps": [{"format": format, "layers_per_level": NUM_LAYERS}]}, **others}


def go(llm: Any, level: int) -> dict[str, Any]:
    """What the rank holds at `level`."""
    follow(llm, {0: level})
    settle(llm, level)
    memory: dict[str, Any] = llm.collective_rpc("morphserve_memory")[0]
    announced = morph_of(llm).runtime.ladder[level].weight_bytes
    # A bias that a variant copies is announced in fp32; the weight-only kernel keeps it in bf16.
    assert memory["weight_bytes"] <= announced and (level or memory["weight_bytes"] == announced), (memory, announced)
    return memory


def down_and_back(llm: Any) -> list[Any]:
    """Tokens and logprobs at level 0, at level 1 and at level 0 again."""
    found = []
    for level in (0, 1, 0):
        go(llm, level)
        found.append(generate(llm, PROMPTS[:4], 16))
    return found


def tensors_kept(worker: Any) -> set[str]:
    """Names of what the model's own linears hold."""
    return {
        name.rpartition(".")[2]
        for name, parameter in worker.model_runner.model.named_parameters()
        if "_proj." in name and parameter.numel()
    }


@pytest.mark.parametrize("kind", ["ct_int8", "ct_int8_asym", "ct_int8_static", "ct_fp8"])
def test_level_0_is_stock_and_comes_back(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """Guards: a scale lost or a matmul built for another dtype when a layer is restored, a bias added twice."""
    model = write_checkpoint(tiny_llama, tmp_path / kind, kind, 0)
    expected = stock_later(model, [PROMPTS[:4]], 16, **PLAIN)
    with engine(model, tmp_path / "variants", all_layers("w4"), **PLAIN) as llm:
        base, swapped, restored = down_and_back(llm)
        full, quarter = (level.weight_bytes for level in morph_of(llm).runtime.ladder)
        kept = llm.collective_rpc(keeps_weights(tensors_kept))[0]
    assert kept == {"bias"}, "swapped out, a weight stays in the model"
    assert quarter < 0.67 * full  # small rows: scales and biases weigh more than in a real model
    assert swapped != base
    assert restored == base == expected.result()[0]


def test_without_a_measured_w4_it_serves_at_level_0(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a model of 8 bits that does not start unless somebody writes a ladder; W4 unasked for; silence."""
    model = write_checkpoint(tiny_llama, tmp_path / "ct_int8", "ct_int8", 0)
    expected = stock_later(model, [PROMPTS[:4]], 16, **PLAIN)
    said: list[tuple[int, str]] = []
    logger = logging.getLogger("vllm.morphserve")
    monkeypatch.setattr(logger, "log", lambda level, text, *args: said.append((level, text % args)))
    unwritten = {"ladder": {}, "policy": {"kind": "threshold", "max_level": "8bit"}}
    with engine(model, tmp_path / "variants", unwritten, **PLAIN) as llm:
        assert len(morph_of(llm).runtime.ladder) == 1
        assert generate(llm, PROMPTS[:4], 16) == expected.result()[0]
        assert not morph_of(llm).status()["errors"] and not morph_of(llm).controller.failed
    ((level, text),) = said
    assert level == logging.WARNING and "level 0 is the only level" in text and "measure-kl MODEL --formats w4" in text


@needs_two_cores
@pytest.mark.usefixtures("two_cores")
def test_two_ranks_rebuild_their_slices(tiny_llama: Path, tmp_path: Path) -> None:
    """Guards: a rank that restores another's rows or scales, or adds a bias that only rank 0 adds."""
    model = write_checkpoint(tiny_llama, tmp_path / "ct_int8", "ct_int8", 0)
    parallel = {**PARALLEL, "enable_prefix_caching": False}
    expected = stock_later(model, [PROMPTS[:4]], 16, **parallel)
    with engine(model, tmp_path / "variants", all_layers("w4"), **parallel) as llm:
        base, swapped, restored = down_and_back(llm)
    assert swapped != base
    assert restored == base == expected.result()[0]


def test_compiled_steps_run_int8_natively(tiny_llama: Path, tmp_path: Path) -> None:
    """Guards: the compiled graph's operator calls oneDNN with other arguments than vLLM's own kernel."""
    model = write_checkpoint(tiny_llama, tmp_path / "ct_int8", "ct_int8", 0)
    compiled = {**PLAIN, "enforce_eager": False}
    expected = stock_later(model, [PROMPTS[:4]], 16, **compiled)
    with engine(model, tmp_path / "variants", all_layers("w4"), **compiled) as llm:
        base, swapped, restored = down_and_back(llm)
        kinds = {slot.impl.native[0] for slot in opaque_linear._SLOTS}
    assert kinds == {"int8_onednn"}
    assert swapped != base
    assert restored == base == expected.result()[0]


@pytest.mark.skipif(not FREED_WEIGHTS_RETURN, reason="not glibc's allocator")
def test_freed_bytes_return_at_once(demo_model: Path, tmp_path: Path) -> None:
    """Guards: vLLM's kernel keeps itself, and the packed weight with it, until Python looks for cycles."""
    model = write_checkpoint(demo_model, tmp_path / "ct_int8", "ct_int8", 0)
    steps = {"ladder": {"steps": [{"format": "w4", "layers_per_level": 10}]}}
    with engine(model, tmp_path / "variants", steps) as llm:
        generate(llm)  # the serving path has taken what it takes
        for level in (3, 0):  # and each kernel what it takes once
            go(llm, level)
        trim()
        gc.collect()
        gc.disable()
        try:
            memory, start = go(llm, 0), resident_bytes()["anonymous"]
            held = memory["weight_bytes"] + memory["kv_resident_bytes"]
            for level in (3, 0, 3, 0):
                memory = go(llm, level)
                assert memory["weight_bytes"] == morph_of(llm).runtime.ladder[level].weight_bytes
                expected = memory["weight_bytes"] + memory["kv_resident_bytes"] - held
                found = resident_bytes()["anonymous"] - start
                print(f"level {level}: weights {memory['weight_bytes']:,} B, resident {found - expected:+,} B off")
                assert abs(found - expected) <= HEAP_NOISE_BYTES, level
        finally:
            gc.enable()


def test_a_checkpoint_in_4_bits_is_a_step(tiny_llama: Path, tmp_path: Path) -> None:
    """Guards: a variant's integers loaded into the int8 weights, or taken for theirs."""
    need_kernel("w4a16")
    model = write_checkpoint(tiny_llama, tmp_path / "ct_int8", "ct_int8", 0)
    source = write_checkpoint(tiny_llama, tmp_path / "awq", "awq", 64)
    config = all_layers("w4", variants={"w4": str(source)}, kernels={"w4": "w4a16"})
    of_vllm = {**PLAIN, **IN_BF16}
    expected = stock_later(source, [PROMPTS[:4]], 16, **of_vllm)
    with engine(model, tmp_path / "variants", config, **of_vllm) as llm:
        base, swapped, restored = down_and_back(llm)
    assert restored == base
    assert swapped == expected.result()[0]


@pytest.mark.parametrize(
    ("kind", "config", "overrides", "words"),
    [
        ("gptq", all_layers("w4"), IN_BF16, "quantization '.*gptq.*'; level 0 must be .* can be a step of its ladder"),
        ("ct_w4_sym", all_layers("w4"), {}, r"layer 0 .* runs CompressedTensorsLinearMethod \(.*WNA16\); level 0 must"),
        ("ct_int8", all_layers("w8"), {}, r"format w8 of 8 bits, which frees nothing.* to \[\{format: w4\}\]"),
        ("ct_fp8", all_layers("w4"), {"enforce_eager": False}, r"\(.*W8A8Fp8\), .* Start with --enforce-eager"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_llama: Path, tmp_path: Path, kind: str, config: dict[str, Any], overrides: dict[str, Any], words: str
) -> None:
    """Guards: a base that cannot be rebuilt, or a ladder that frees nothing, found in the first burst."""
    model = write_checkpoint(tiny_llama, tmp_path / kind, kind, 64)
    with (
        pytest.raises(ConfigError, match=words),
        engine(model, tmp_path / "variants", config, **{**PLAIN, **overrides}),
    ):
        pass


def test_a_profile_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Guards: scales and prices of other weights, whose norms are the same."""
    model = write_checkpoint(tiny_llama, tmp_path / "ct_int8", "ct_int8", 0)
    write_profile(tmp_path / "profile", "fingerprint", {}, (), range(NUM_LAYERS), {}, {})
    config = all_layers("w4", profile=str(tmp_path / "profile"))
    with (
        pytest.raises(ConfigError, match="profile .* is of bf16 or fp16 weights, these run Compressed.*W8A8Int8"),
        engine(model, tmp_path / "variants", config, **PLAIN),
    ):
        pass
