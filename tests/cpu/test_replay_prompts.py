"""Prompts of exact length from real text."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpu.replay_fakes import CORPUS, encode
from hypothesis import given
from hypothesis import strategies as st

from morphserve.tools.workload import WorkloadError
from morphserve.tools.workload.formats import TraceRequest
from morphserve.tools.workload.prompts import PromptMaker, load_encoder, read_corpus
from morphserve.tools.workload.workload import Workload

SHIPPED = Path(__file__).parents[2] / "scripts" / "corpus" / "wikitext2.txt"


def workload(*lengths: int, hash_ids: tuple[tuple[int, ...], ...] = (), block_tokens: int = 512) -> Workload:
    ids = hash_ids or tuple(() for _ in lengths)
    rows = [TraceRequest(float(i), n, 4, h) for i, (n, h) in enumerate(zip(lengths, ids, strict=True))]
    return Workload("w", tuple(rows), block_tokens)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(0, 3))
def test_prompts_have_exactly_the_tokens_asked_for(lengths: list[int], seed: int) -> None:
    """Guards the load itself: a prompt off by one token is another workload."""
    prompts = PromptMaker(CORPUS, encode, seed).make(workload(*lengths))
    assert [len(p) for p in prompts] == lengths
    assert all(p[0] == 0 for p in prompts if len(p) > 1)  # what the tokenizer puts first


def test_same_seed_same_prompts_other_seed_other_prompts() -> None:
    """Guards repeatability: two runs of a comparison must be asked the same things."""
    asked = workload(*[30] * 300)  # more requests than the corpus has lines
    first = PromptMaker(CORPUS, encode, 1).make(asked)
    maker = PromptMaker(CORPUS, encode, 1)
    maker.make(workload(20, 20, hash_ids=((1,), (2,))))
    assert maker.make(asked) == first  # nothing is left over from the time before
    assert PromptMaker(CORPUS, encode, 2).make(asked) != first


def test_requests_get_different_slices() -> None:
    """Guards prefix caching runs: equal prompts would be cache hits that the trace never had."""
    prompts = PromptMaker(CORPUS, encode, 0).make(workload(*[40] * 100))
    assert len({tuple(p[:12]) for p in prompts}) == 100


def test_equal_hash_ids_share_their_prefix_and_nothing_more() -> None:
    """Guards Mooncake's prefix structure: shared blocks share text, private ones do not."""
    ids = ((1, 2), (1, 3), (4, 2), (1, 2))
    a, b, c, d = PromptMaker(CORPUS, encode, 0).make(workload(25, 25, 25, 18, hash_ids=ids, block_tokens=10))
    assert a[:11] == b[:11]  # the lead token and the block of id 1
    assert a[11:] != b[11:]
    assert a[:11] != c[:11]
    assert d == a[:18]


def test_small_corpus_is_refused() -> None:
    """Guards against prompts that repeat the same few words."""
    with pytest.raises(WorkloadError, match="needs at least 256"):
        PromptMaker("a few words only", encode)
    with pytest.raises(WorkloadError, match="corpus"):
        read_corpus("/no/such/corpus.txt")


def test_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    """Guards against a download, or a traceback, where the model directory has no tokenizer."""
    with pytest.raises(WorkloadError, match="--tokenizer"):
        load_encoder(str(tmp_path))


def test_shipped_corpus_is_prose() -> None:
    """Guards the shipped text: data set marks such as <unk> are not what people write."""
    text = read_corpus(SHIPPED)
    assert len(text) > 100_000
    assert not any(mark in text for mark in ("<unk>", " @-@ ", " @,@ "))
