"""Two ranks under torch.compile, vLLM's default: each rank's compiled artifact serves every level."""

from __future__ import annotations

from pathlib import Path

from engine import rank_probe
from engine.harness import engine
from engine.rank_harness import CONFIG, PARALLEL, W4, W8, go, needs_two_cores, rpc, run

pytestmark = needs_two_cores


def test_two_ranks_swap_without_compiling_again(tiny_llama: Path, tmp_path: Path, two_cores: None) -> None:
    """Guards: on one rank the compiled graph keeps the weights it was traced with, or slots have other numbers."""
    with engine(tiny_llama, tmp_path, CONFIG, **PARALLEL, enforce_eager=False) as llm:
        seen = [run(llm)]
        counted = rpc(llm, rank_probe.compilations)
        assert all(any(rank[2].values()) for rank in counted), "a rank has compiled nothing"
        for level in (W8, W4):
            go(llm, level)
            llm.reset_prefix_cache()
            seen.append(run(llm))
            for earlier in seen[:-1]:
                assert all(now[1] != then[1] for now, then in zip(seen[-1], earlier, strict=True))
        go(llm, 0)
        llm.reset_prefix_cache()
        assert run(llm) == seen[0]
        assert rpc(llm, rank_probe.compilations) == counted
