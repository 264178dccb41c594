"""What users switch on besides: the KV cache is resized and layers change under it, and no answer differs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.harness import engine, follow, kv_script, morph_of, settle
from engine.rank_harness import CONFIG, NUM_LAYERS, W4
from engine.test_families import make_family
from safetensors.torch import save_file

from morphserve.errors import ConfigError

NUM_REQUESTS = 10
PROMPT_TOKENS = 100  # four blocks of 32
RESIZES = {2: 140, 9: 40, 13: 120, 17: 34, 22: 60, 27: 146, 33: 36}
# From 146 blocks, with room for all requests at every moment: the same batches, whatever the size.
ROOMY = {2: 100, 9: 60, 13: 80, 17: 58, 22: 70, 27: 146, 33: 56}
_random = random.Random(1)
# A phrase over and over: what an n-gram proposer, or an adapter, has something to do with.
_phrases = [[_random.randrange(3, 512) for _ in range(PROMPT_TOKENS // 4)] for _ in range(NUM_REQUESTS)]
PROMPTS = [{"prompt_token_ids": phrase * 4} for phrase in _phrases]
FILLERS = [{"prompt_token_ids": [_random.randrange(3, 512) for _ in range(PROMPT_TOKENS)]} for _ in range(6)]


def make_adapter(directory: Path) -> Path:
    """A LoRA adapter of the tiny Llama."""
    torch.manual_seed(2)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for name, (n, k) in {"self_attn.q_proj": (512, 512), "mlp.down_proj": (512, 1024)}.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.05 * torch.randn(8, k)
            tensors[f"{prefix}.lora_B.weight"] = 0.05 * torch.randn(n, 8)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none",
        "target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": "tiny",
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


Answers = list[tuple[tuple[int, ...], tuple[float, ...]]]


def asker(llm: Any, arguments: Callable[[int], dict[str, Any]], **params: Any) -> Callable[[], Answers]:
    """A function that asks all prompts, behind short ones that take the low blocks and leave."""
    from vllm import SamplingParams

    own = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "logprobs": 1} | params
    short = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)

    def ask() -> Answers:
        llm.reset_prefix_cache()
        engine_ids = []
        for i, prompt in enumerate(FILLERS):
            llm.llm_engine.add_request(f"filler-{i}", dict(prompt), short)
        for i, prompt in enumerate(PROMPTS):
            engine_ids.append(f"asked-{i}")
            llm.llm_engine.add_request(engine_ids[-1], dict(prompt), SamplingParams(**own), **arguments(i))
        found: dict[str, Any] = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    found[output.request_id] = output
        return [_answer(found[i]) for i in engine_ids]

    return ask


def _answer(output: Any) -> tuple[tuple[int, ...], tuple[float, ...]]:
    chosen = output.outputs[0]
    probabilities = [step[token].logprob for token, step in zip(chosen.token_ids, chosen.logprobs, strict=True)]
    return tuple(chosen.token_ids), tuple(probabilities)


def check(llm: Any, ask: Callable[[], Answers], resizes: dict[int, int] = RESIZES) -> None:
    """Resizing changes nothing; quantized layers change something; restored is as before."""
    expected = ask()
    assert ask() == expected, "these runs cannot be compared"
    with kv_script(llm, resizes) as driver:
        assert ask() == expected
        assert driver.num_copied > 0, "no live block was moved"
    follow(llm, {0: W4})
    settle(llm, W4)
    assert all(now[1] != then[1] for now, then in zip(ask(), expected, strict=True))
    follow(llm, {0: 0, 5: W4, 20: 0})
    ask()
    settle(llm, 0)
    assert ask() == expected
    assert not morph_of(llm).status()["errors"]


def ngram_speculation(model: str, cache: str) -> None:
    """With room for all requests from the start: one that waits, or is preempted, is proposed other tokens and rounds
    otherwise, in stock vLLM too."""
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options: dict[str, Any] = {"speculative_config": speculative, "num_gpu_blocks_override": 146}
    with engine(Path(model), Path(cache), CONFIG, skip_tokenizer_init=True, **options) as llm:
        accepted = []
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        original = scheduler.make_spec_decoding_stats

        def counted(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any) -> Any:
            accepted.append(num_accepted_tokens)
            return original(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        scheduler.make_spec_decoding_stats = counted
        check(llm, asker(llm, lambda i: {}), ROOMY)
        assert sum(accepted) > 0, "nothing was proposed well"


def test_ngram_speculation(tiny_llama: Path, variant_cache: Path) -> None:
    """Guards: blocks of proposed tokens that are moved, or cut off by a shrink, before they are accepted.

    In a process of its own: numba, which the proposer loads, breaks the start of the next engine in one process
    (vllm/triton_utils/dispatcher.py reads the attributes of every module).
    """
    code = "import sys; from engine.test_features import ngram_speculation; ngram_speculation(*sys.argv[1:])"
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    command = [sys.executable, "-c", code, str(tiny_llama), str(variant_cache)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]


def test_lora(tiny_llama: Path, variant_cache: Path, tmp_path: Path) -> None:
    """Guards: an adapter lost with the layer below it, or layers that are not found inside their wrappers."""
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("adapter", 1, str(make_adapter(tmp_path / "adapter")))
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    # Adapters round otherwise in a batch of another size, on more than one thread; so does stock vLLM.
    options: dict[str, Any] = {**lora, "num_gpu_blocks_override": 146, "skip_tokenizer_init": True}
    with engine(tiny_llama, variant_cache, CONFIG, **options) as llm:
        # All requests with the adapter, or none: in a mixed batch stock vLLM 0.32 on CPU gives it to everybody.
        plain = asker(llm, lambda i: {})()
        with_adapter = asker(llm, lambda i: {"lora_request": adapter})
        assert all(now[0] != then[0] for now, then in zip(with_adapter(), plain, strict=True))
        check(llm, with_adapter, ROOMY)


def test_priorities(tiny_llama: Path, variant_cache: Path) -> None:
    """Guards: a scheduler whose queues are ordered otherwise than ours looks at them."""
    options: dict[str, Any] = {"scheduling_policy": "priority", "skip_tokenizer_init": True, "max_num_seqs": 6}
    with engine(tiny_llama, variant_cache, CONFIG, **options) as llm:
        check(llm, asker(llm, lambda i: {"priority": -i}))


def test_sliding_windows_beside_full_attention(tmp_path: Path, variant_cache: Path) -> None:
    """Guards: two kinds of KV blocks in one pool, of which one table keeps the old id."""
    model = make_family(tmp_path / "gemma", "gemma3_text")
    config = {**CONFIG, "ladder": {"steps": [{"format": fmt, "layers_per_level": 2} for fmt in ("w8", "w4")]}}
    options: dict[str, Any] = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 120}
    with engine(model, variant_cache, config, **options) as llm:
        morph = morph_of(llm)
        assert len(morph._scheduler.kv_cache_config.kv_cache_groups) > 1
        top = morph.pool.num_kv_blocks
        expected = (ask := asker(llm, lambda i: {}))()
        assert ask() == expected
        with kv_script(llm, {2: 90, 9: top, 13: 80, 17: 110, 22: 70, 27: top}) as driver:
            assert ask() == expected
            assert driver.num_copied > 0
        deepest = len(morph.runtime.ladder) - 1
        follow(llm, {0: deepest, 20: 0})
        ask()
        settle(llm, 0)
        assert ask() == expected and not morph.controller.failed


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"enable_lora": True}, {"profile": "/some/profile"}, "profile: .* together with --enable-lora"),
        ({"enable_lora": True}, {"variants": {"w4": "/some/checkpoint"}}, "variants: .* together with --enable-lora"),
    ],
)
def test_what_adapters_read_must_not_be_scaled(
    tiny_llama: Path, variant_cache: Path, options: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    """Guards: an adapter on inputs that a variant's norm has scaled: wrong answers and no error."""
    with pytest.raises(ConfigError, match=message), engine(
        tiny_llama, variant_cache, {**CONFIG, **config}, skip_tokenizer_init=True, **options
    ):
        pass
