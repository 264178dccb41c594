"""vLLM's default on CPU is torch.compile: one compiled artifact serves every level."""

from __future__ import annotations

from pathlib import Path

from engine.harness import PROMPTS, compilations, engine, follow, generate, settle


def test_swaps_take_effect_without_compiling_again(short_model: Path, variant_cache: Path) -> None:
    """Guards: the compiled graph keeps the weights it was traced with, or every level costs a compilation."""
    used = PROMPTS[:4]
    with engine(short_model, variant_cache, enforce_eager=False) as llm:
        before = generate(llm, used, 24)
        counted = compilations()
        assert counted[0].get("unique_graphs", 0) > 0 or any(counted[2].values()), "nothing was compiled"
        seen = [before]
        for level in (2, 4):
            follow(llm, {0: level})
            settle(llm, level)
            degraded = generate(llm, used, 24)
            for earlier in seen:
                assert all(now[1] != then[1] for now, then in zip(degraded, earlier, strict=True))
            seen.append(degraded)
        follow(llm, {0: 0})
        settle(llm, 0)
        llm.reset_prefix_cache()
        assert generate(llm, used, 24) == before
        assert compilations() == counted
