"""Two ranks under torch.compile, vLLM's default: each rank's compiled artifact serves every level."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from engine import rank_probe
from engine.harness import engine
from engine.rank_harness import CONFIG, PARALLEL, W4, W8, go, needs_two_cores, rpc, run

pytestmark = needs_two_cores


def test_two_ranks_swap_without_compiling_again(tiny_llama: Path, tmp_path: Path, two_cores: None) -> None:
    """Guards: on one rank the compiled graph keeps the weights it was traced with, or every level is compiled."""
    with engine(tiny_llama, tmp_path, CONFIG, **PARALLEL, enforce_eager=False) as llm:
        seen = [run(llm)]
        counted = rpc(llm, rank_probe.compilations)
        assert all(any(rank[2].values()) for rank in counted), "a rank has compiled nothing"

        def look() -> None:
            llm.reset_prefix_cache()
            seen.append(run(llm))

        for level in (W8, W4, 0):
            go(llm, level)
            look()
        for rank in (0, 1):  # were one deaf, the other alone would have made the tokens above differ
            rpc(llm, rank_probe.swap_alone, rank, "w8")
            look()
            rpc(llm, rank_probe.swap_alone, rank, "base")
        look()
        base, w8, w4, restored, *alone, last = seen
        assert restored == last == base
        for one, other in combinations((base, w8, w4, *alone), 2):
            assert all(a[1] != b[1] for a, b in zip(one, other, strict=True))
        assert rpc(llm, rank_probe.compilations) == counted
