"""Levels and steps are measured by the workers that serve, on however many ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine.forked import fork_ranks
from engine.rank_harness import NUM_LAYERS, needs_two_cores

from morphserve.config import parse_config
from morphserve.cpu_tier import best_dtype

_random = random.Random(1)
TEXTS = [[_random.randrange(3, 512) for _ in range(48)] for _ in range(2)]
ALL_W8, ALL_W4 = dict.fromkeys(range(NUM_LAYERS), "w8"), dict.fromkeys(range(NUM_LAYERS), "w4")
FORMATS = [{"format": "w8"}, {"format": "w4"}]
RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def measured(model: Path, cache: Path, **arguments: Any) -> tuple[list[dict[str, float]], dict[str, list[int]]]:
    from morphserve.integration.offline.served_model import ServedModel, measure_levels

    settings = {"cache_dir": str(cache), "ladder": {"steps": FORMATS}}
    with ServedModel(
        str(model), 48, settings, dtype=best_dtype(), skip_tokenizer_init=True, num_gpu_blocks_override=40,
        block_size=32, **arguments,
    ) as engine:  # fmt: skip
        return measure_levels(engine, [{}, ALL_W8, ALL_W4], TEXTS), engine.layer_bytes


@needs_two_cores
def test_levels_are_measured_on_two_ranks(tiny_llama: Path, variant_cache: Path, two_cores: None) -> None:
    """Guards: a plan whose answers nobody waits for; one that a single rank carries out; logits that are taken where
    there are none, or of another text."""
    alone, sizes = measured(tiny_llama, variant_cache)
    fork_ranks()
    both, slices = measured(tiny_llama, variant_cache, **RANKS)
    for rows in (alone, both):
        base, w8, w4 = rows
        assert base["kl"] == 0.0 and base["top1"] == 1.0 and base["ppl"] == base["ppl_base"]
        assert 0 < w8["kl"] < w4["kl"] / 2
    for one, two in zip(alone[1:], both[1:], strict=True):
        assert two["kl"] == pytest.approx(one["kl"], rel=0.25), "slices are rounded by themselves, no more"
        assert two["ppl_base"] == pytest.approx(one["ppl_base"], rel=0.02)
    assert all(0.4 < b / a < 0.6 for fmt in sizes for a, b in zip(sizes[fmt], slices[fmt], strict=True))


@needs_two_cores
def test_steps_are_timed_on_two_ranks(tiny_llama: Path, variant_cache: Path, two_cores: None) -> None:
    """Guards: a calibration that only a lone rank gets, that stops below the largest step or prompt, or that is filed
    under another place; one that ends without a decode step, as a batch takes more steps for its prompts."""
    from morphserve.integration.offline.timed_engine import TimedEngine

    fork_ranks()
    config = parse_config({"cache_dir": str(variant_cache), "ladder": {"steps": FORMATS}})
    with TimedEngine(
        str(tiny_llama), config, block_size=32, max_model_len=448, max_num_seqs=48, max_num_batched_tokens=512,
        dtype=best_dtype(), enforce_eager=True, skip_tokenizer_init=True, **RANKS,
    ) as engine:  # fmt: skip
        for level in (0, 1, 2):
            engine.go_to(level)
            engine.visit()
        engine.go_to(0)
        assert (engine.place.tensor_parallel, engine.place.compiled) == (2, False)
        assert engine.formats == ("base", "w8", "w4") and engine.ratios("w8").keys() == {1, 2, 4, 8, 16, 32, 48}
        for steps in engine.steps.values():
            assert max(step.num_seqs for step in steps) == 48
            assert max(step.prefill_tokens for step in steps) > 300
            assert all(step.seconds > 0 for step in steps)
        assert engine.move().degrade_s > 0 and engine.move().restore_s > 0
        assert len(engine.rank_bytes().layers["base"]) == NUM_LAYERS
