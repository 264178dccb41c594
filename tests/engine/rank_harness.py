"""A model made here for two tensor-parallel ranks, and how the tests drive an engine of several ranks."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.harness import follow, generate, morph_of, settle

from morphserve.control.transition_book import DirectionBackOff
from morphserve.integration.worker import keeps_weights

# Read before an engine has bound this process to a core.
CORES = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason=f"two ranks need 2 cores, this process has {len(CORES)}")

NUM_LAYERS = 6
W8, W4 = 3, 6  # the levels at which all layers are in that format
PARALLEL = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 1024,  # all prompts of a round in one step; see BATCH_TOKENS
}
CONFIG = {
    "ladder": {"order": "front_to_back", "steps": [{"format": fmt, "layers_per_level": 2} for fmt in ("w8", "w4")]},
    # Runs are compared token by token: nothing may depend on how fast this machine is today.
    "transition": {"max_layers_per_step": 2, "max_pause_ms": 1e6, "backoff_s": 600.0},
    "kv": {"drain_timeout_s": 600.0},
}
NUM_TOKENS = 48
_random = random.Random(0)


def _prompts(num: int) -> tuple[dict[str, list[int]], ...]:
    """Token ids; a common first block, so that prefix hits happen."""
    common = [_random.randrange(3, 512) for _ in range(32)]
    own = [[_random.randrange(3, 512) for _ in range(58)] for _ in range(num)]
    return tuple({"prompt_token_ids": common + ids} for ids in own)


ROUNDS = [_prompts(8) for _ in range(5)]
PROMPTS = ROUNDS[0]
# Rounds of new prompts walk through the block pool, so that the last one lives in the tail that is taken away.
SCRIPT = {0: 0, 6: W8, 12: W4, 60: 5, 64: W4, 210: 2, 220: 5, 225: 0}
RESIZES = {3: 140, 9: 38, 14: 120, 18: 30, 20: 34, 27: 49, 33: 146, 36: 40, 43: 36, 46: 60}


def make_model(directory: Path, num_layers: int = NUM_LAYERS) -> Path:
    """A Llama of random weights whose heads divide by two.

    Its row-parallel linears have a bias, which only rank 0 adds: the ranks do not hold the same bytes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=512,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            initializer_range=0.1,
        )
    )
    for name, parameter in llama.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    llama.to(torch.bfloat16).save_pretrained(directory)
    return directory


def rpc(llm: Any, method: str | Callable[..., Any], *args: Any) -> list[Any]:
    """Every rank's answer, in the order of ranks."""
    return llm.collective_rpc(method if isinstance(method, str) else keeps_weights(method), args=args)


def run(llm: Any, prompts: tuple[Any, ...] = PROMPTS) -> list[Any]:
    return generate(llm, prompts, NUM_TOKENS)


def go(llm: Any, level: int) -> None:
    """Move the idle engine; a back-off that a fault has left is over."""
    controller = morph_of(llm).controller
    controller._book.backoff = DirectionBackOff(controller._config.transition)
    follow(llm, {0: level})
    settle(llm, level)


def scripted(llm: Any) -> dict[str, Any]:
    """Tokens and logprobs of requests that live through `SCRIPT`, and how many live blocks were moved."""
    morph = morph_of(llm)
    advance, copies = morph.pool.advance_shrink, []

    def counted(max_copies: int) -> Any:
        step = advance(max_copies)
        copies.extend(step.copies)
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(morph.pool, "advance_shrink", counted)
        follow(llm, SCRIPT)
        return {"runs": [run(llm, prompts) for prompts in ROUNDS], "num_copied": len(copies)}
