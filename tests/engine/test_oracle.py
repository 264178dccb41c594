"""A mix of requests on one rank, see `oracle`; on several ranks in test_ranks.py and test_pipeline.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from engine import oracle
from engine.harness import engine
from engine.rank_harness import CONFIG

from morphserve.integration.rank_kv import RankKV


def test_a_mix_of_requests_is_answered_as_without_resizing(
    tiny_llama: Path, variant_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a copy, a table, a hash or an order of commands that fails under some mix of requests only."""
    with engine(tiny_llama, variant_cache, CONFIG, skip_tokenizer_init=True) as llm:
        sys.stdout.write(f"oracle, one rank: {oracle.check(llm)}\n")
        # The mix must be able to tell: without the copies it does.
        monkeypatch.setattr(RankKV, "copy", lambda self, pairs: None)
        with pytest.raises(AssertionError, match="differ"):
            oracle.check(llm)
