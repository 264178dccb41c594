"""Cases of test_device.py: a real engine with fake pages in place of a GPU's, commands that go on beside the steps.

Everything above the driver is what a GPU runs: parameters moved into the arena, variants on the host, pages that go
between layers and KV, answers that are pending, and the operator that finds its linear by the weight's address.
"""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from engine.harness import PROMPTS, compilations, engine, follow, generate, morph_of, settle
from engine.rank_harness import CONFIG, PARALLEL, W4, W8, needs_two_cores, run

from morphserve.cpu_tier import best_dtype


def steps(layers_per_level: int) -> dict[str, Any]:
    return {"ladder": {"steps": [{"format": fmt, "layers_per_level": layers_per_level} for fmt in ("w8", "w4")]}}


USED = PROMPTS[:4]


@pytest.fixture(autouse=True)
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered in this process and in those that it starts."""
    directory = str(Path(__file__).parents[1] / "fake_device")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setenv("PYTHONPATH", directory, prepend=os.pathsep)


def memory_of(llm: Any) -> dict[str, Any]:
    return llm.llm_engine.collective_rpc("morphserve_memory")[0]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_layers_and_blocks_exchange_pages_under_load(short_model: Path, variant_cache: Path, eager: bool) -> None:
    """Guards rules 1 to 6 above the driver: levels that change nothing, or do not come back; a page lost; a block
    published before it has pages; a compilation at a switch."""
    # Compiled as by default on a GPU: as much of a level at once as the reserve may hold, here all ten layers.
    config = steps(5) if eager else steps(10) | {"transition": {}}
    with engine(short_model, variant_cache, config, enforce_eager=eager) as llm:
        assert morph_of(llm).runtime.config.transition.max_layers_per_step == (5 if eager else 10)
        limits = morph_of(llm).setup.limits
        assert limits is not None and limits.moves_beside_steps, "what the policy takes a way between levels for"
        ladder = morph_of(llm).runtime.ladder
        granularity = morph_of(llm).runtime.rank_bytes[0].kv_granularity
        assert granularity > 1 and all(level.num_kv_blocks % granularity == 0 for level in ladder)
        before, pages = generate(llm, USED, 24), memory_of(llm)
        counted = compilations()
        seen = [before]
        for level in (2, 4) if eager else (1, 2):
            follow(llm, {0: level})
            settle(llm, level, patience_s=60)
            assert morph_of(llm).pool.num_kv_blocks == ladder[level].num_kv_blocks > ladder[0].num_kv_blocks
            degraded = generate(llm, USED, 24)
            assert all(now[1] != then[1] for earlier in seen for now, then in zip(degraded, earlier, strict=True))
            seen.append(degraded)
        # Down and up again while more requests run than level 0's blocks could hold.
        if eager:
            follow(llm, {0: 4, 20: 0, 40: 2, 60: 0})
            generate(llm, PROMPTS * 2, 72, logprobs=1)
        follow(llm, {0: 0})
        settle(llm, 0, patience_s=60)
        llm.reset_prefix_cache()
        assert generate(llm, USED, 24) == before
        assert memory_of(llm) == pages, "pages do not come back"
        assert compilations() == counted
        assert not morph_of(llm).controller.status()["failed"]


@needs_two_cores
def test_two_ranks_work_beside_their_steps(tiny_llama: Path, tmp_path: Path, two_cores: None) -> None:
    """Guards rule 8 where each rank has a thread of its own: one that is done later than the other, a question that
    fills the ring, a level that only one rank has."""
    with engine(tiny_llama, tmp_path, CONFIG, **PARALLEL) as llm:
        seen = [run(llm)]
        pages = llm.llm_engine.collective_rpc("morphserve_memory")
        for level in (W8, W4, 0):
            follow(llm, {0: level})
            settle(llm, level, patience_s=60)
            assert [rank["formats"] for rank in llm.llm_engine.collective_rpc("morphserve_memory")] == 2 * [
                dict(enumerate(morph_of(llm).runtime.ladder[level].layer_formats))
            ]
            llm.reset_prefix_cache()
            seen.append(run(llm))
        base, w8, w4, restored = seen
        assert restored == base
        for one, other in combinations((base, w8, w4), 2):
            assert all(a[1] != b[1] for a, b in zip(one, other, strict=True))
        assert llm.llm_engine.collective_rpc("morphserve_memory") == pages
        assert not morph_of(llm).controller.status()["failed"]


def test_levels_are_measured_in_pages(short_model: Path, variant_cache: Path) -> None:
    """Guards: figures of a host's worker for what a device serves; an answer that is still pending taken for one."""
    from morphserve.integration.offline.served_model import ServedModel, measure_levels

    settings = {"cache_dir": str(variant_cache), "ladder": {"steps": [{"format": "w8"}, {"format": "w4"}]}}
    with ServedModel(str(short_model), 64, settings, num_gpu_blocks_override=49, block_size=32) as model:
        assert model.morph.executor.in_background
        ids = model.tokenizer.encode(PROMPTS[0] * 8)[:64]
        layers = range(model.num_layers)
        base, w8, w4 = measure_levels(model, [{}, dict.fromkeys(layers, "w8"), dict.fromkeys(layers, "w4")], [ids])
        assert base["kl"] == 0.0 and 0 < w8["kl"] < w4["kl"]


def test_steps_are_timed_in_pages(tiny_llama: Path, variant_cache: Path) -> None:
    """Guards: a calibration of a host's worker for what a device serves; formats that are timed and never entered; a
    move whose pauses nobody notes, as they happen beside the steps; pages that do not come back."""
    from morphserve.config import parse_config
    from morphserve.integration.offline.timed_engine import TimedEngine

    config = parse_config({"cache_dir": str(variant_cache), "ladder": {"steps": [{"format": "w8"}, {"format": "w4"}]}})
    with TimedEngine(
        str(tiny_llama), config, block_size=32, max_model_len=128, max_num_seqs=8, dtype=best_dtype(),
        enforce_eager=True, skip_tokenizer_init=True,
    ) as timed:  # fmt: skip
        assert timed.morph.executor.in_background
        pages = timed.engine.collective_rpc("morphserve_memory")
        for level in (0, 1, 2):
            timed.go_to(level)
            timed.visit()
        timed.go_to(0)
        assert timed.engine.collective_rpc("morphserve_memory") == pages
        assert timed.formats == ("base", "w8", "w4") and timed.ratios("w4").keys() == {1, 2, 4, 8}
        assert all(step.seconds > 0 for steps in timed.steps.values() for step in steps)
        assert all(max(step.num_seqs for step in steps) == 8 for steps in timed.steps.values())
        assert timed.move().degrade_s > 0 and timed.move().restore_s > 0
        sizes = timed.rank_bytes().layers
        assert all(sum(sizes["w4"]) < sum(sizes[fmt]) for fmt in ("base", "w8"))
