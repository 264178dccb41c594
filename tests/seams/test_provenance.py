"""Provenance on vLLM's real KVCacheManager: who may reuse KV of which level."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from seams.logged import records_of
from seams.pool_harness import BLOCK, KVModel, make_request

from morphserve.integration.engine.provenance import CLEAN, Span
from morphserve.integration.engine.requests.receipts import PRECISION_ARG, RECEIPT_ARG, Receipts

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]  # two full blocks and one token


def hits(kv: KVModel, tokens: list[int], name: str = "probe") -> int:
    """Tokens a new request with this prompt would take from the prefix cache."""
    return kv.manager.get_computed_blocks(make_request(name, tokens))[1]


def written_at(kv: KVModel, level: int, tokens: list[int] = PROMPT) -> None:
    """A request with these tokens ran at `level`, where the engine still is, and has ended."""
    kv.set_level(level)
    assert kv.step(make_request(f"at{level}", tokens))
    kv.end(f"at{level}")


def test_only_degraded_blocks_leave_the_cache_at_level_0() -> None:
    """Guards against degraded hits at level 0, and against throwing clean prefixes away with them."""
    kv = KVModel()
    assert kv.step(make_request("clean", PROMPT))
    kv.set_level(1)
    degraded = [0, *PROMPT]
    assert kv.step(make_request("degraded", degraded))
    assert kv.step(make_request("extends", [*PROMPT, 1, 1, 1, 1]))
    assert kv.provenance.span("degraded") == Span(1, 1)
    assert hits(kv, degraded) == 8
    assert hits(kv, [*PROMPT, 1, 1, 1, 1]) == 12
    kv.set_level(0)
    assert hits(kv, degraded) == 0
    assert hits(kv, [*PROMPT, 1, 1, 1, 1]) == 8
    kv.provenance.sweep()
    assert not kv.provenance._written
    assert [block.block_id for block in kv.pool.blocks if block.block_hash] == kv.manager.get_block_ids("clean")[0][:2]


@pytest.fixture
def five_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small cache takes several steps."""
    monkeypatch.setattr("morphserve.integration.engine.provenance._SWEPT_PER_STEP", 5)


@pytest.mark.usefixtures("five_a_step")
def test_a_return_to_level_0_costs_a_step_a_few_blocks() -> None:
    """Guards: all degraded blocks of a large cache evicted between two steps, while every request waits."""
    kv = KVModel()
    for number in range(8):
        written_at(kv, 1, [number] * 17)
    remembered = len(kv.provenance._written)
    evicted: list[int] = []
    evict = kv.pool._maybe_evict_cached_block
    kv.pool._maybe_evict_cached_block = lambda block: evicted.append(block.block_id) or evict(block)
    kv.set_level(0)
    assert remembered > 24 and not evicted and not any(hits(kv, [number] * 17) for number in range(8))
    steps = 0
    while kv.provenance._written:
        before, steps = len(evicted), steps + 1
        kv.provenance.sweep()
        assert len(evicted) - before <= 5
        assert not any(hits(kv, [number] * 17) for number in range(8))
    assert steps == -(-remembered // 5) and len(evicted) == remembered
    assert not any(block.block_hash for block in kv.pool.blocks)


@pytest.mark.usefixtures("five_a_step")
def test_a_burst_that_comes_back_finds_what_it_wrote() -> None:
    """Guards: blocks forgotten in mid-sweep that are still in the cache, and then pass for clean."""
    kv = KVModel()
    for number in range(8):
        written_at(kv, 2, [number] * 17)
    kv.set_level(0)
    kv.provenance.sweep()
    kv.set_level(1)
    kv.provenance.sweep()
    assert kv.provenance._written and not any(hits(kv, [number] * 17) for number in range(8))
    kv.set_level(2)
    assert any(hits(kv, [number] * 17) for number in range(8))


def test_a_request_that_ran_degraded_caches_nothing_more() -> None:
    """Guards against full-precision layers over degraded context entering the cache as clean."""
    kv = KVModel()
    kv.set_level(1)
    request = make_request("short", [5, 6])  # caches no block while degraded
    assert kv.step(request)
    kv.set_level(0)
    for token in range(10):
        request.append_output_token_ids(token)
        assert kv.step(request)
    tokens = list(request.all_token_ids)
    assert kv.provenance.span("short") == Span(0, 1)
    assert hits(kv, tokens) == 0
    kv.end("short")
    assert kv.provenance.span("short") == CLEAN
    assert kv.step(make_request("short", tokens))  # the same id again, clean
    assert hits(kv, [*tokens, 1]) == 12


def test_a_request_recomputed_at_level_0_is_clean_again() -> None:
    """Guards against a preempted request that is barred from the cache although nothing degraded is left."""
    kv = KVModel()
    kv.set_level(1)
    assert kv.step(make_request("r", PROMPT))
    kv.set_level(0)
    assert kv.step(kv.preempt("r"))
    assert kv.provenance.span("r") == CLEAN
    assert hits(kv, PROMPT) == 8


@pytest.mark.parametrize(
    ("rule", "admitted"),
    [
        ("any", {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)}),
        ("not_worse", {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)}),
        ("exact", {(0, 0), (1, 1), (2, 2)}),
    ],
)
def test_each_rule_between_any_two_levels(rule: Any, admitted: set[tuple[int, int]]) -> None:
    """Guards against a rule that lets through what it forbids, or forbids what it lets through."""
    found = set()
    for written in range(3):
        for asking in range(3):
            kv = KVModel(rule)
            written_at(kv, written)
            kv.set_level(asking)
            if hits(kv, [*PROMPT, 1]):
                found.add((written, asking))
    assert found == admitted


@pytest.mark.parametrize("rule", ["any", "not_worse", "exact"])
@pytest.mark.parametrize("level", [0, 2])
def test_full_precision_is_level_0_whatever_the_rule(rule: Any, level: int) -> None:
    """Guards against a request that must have full precision and gets KV that quantized layers wrote."""
    kv = KVModel(rule)
    written_at(kv, 0, [7, *PROMPT])
    written_at(kv, 1)
    kv.set_level(level)
    kv.provenance.demand_full_precision("strict")
    assert hits(kv, [*PROMPT, 1], "strict") == 0
    assert hits(kv, [7, *PROMPT, 1], "strict") == 8
    kv.provenance.forget("strict")
    assert hits(kv, [*PROMPT, 1], "strict") == (8 if rule == "any" or (rule == "not_worse" and level == 2) else 0)


def test_among_duplicates_the_one_that_may_be_reused_is_found() -> None:
    """Guards against a clean block that is never found again behind a degraded one with the same tokens."""
    kv = KVModel("exact")
    kv.set_level(1)
    assert kv.step(make_request("first", PROMPT))
    kv.set_level(0)
    assert hits(kv, PROMPT) == 0
    assert kv.step(make_request("second", PROMPT))  # computes the same blocks again, at level 0
    for level, owner in ((0, "second"), (1, "first")):
        kv.set_level(level)
        blocks = kv.manager.get_computed_blocks(make_request("third", PROMPT))[0].blocks[0]
        assert [b.block_id for b in blocks] == kv.manager.get_block_ids(owner)[0][:2]


def test_a_mixed_context_is_as_bad_as_its_worst_part() -> None:
    """Guards against tokens computed at level 0 over reused degraded KV that pass for clean, or for exact."""
    kv = KVModel("any")
    written_at(kv, 2)
    kv.set_level(0)
    longer = [*PROMPT, 1, 1, 1, 1]
    assert kv.step(make_request("mixed", longer))
    assert kv.provenance.span("mixed") == Span(0, 2)
    assert kv.provenance.reused("mixed") == {2: 2}
    third = kv.pool.blocks[kv.manager.get_block_ids("mixed")[0][2]]
    assert kv.provenance.block_span(third) == Span(0, 2)
    kv.provenance.rule = "exact"
    for level in (0, 2):
        kv.set_level(level)
        assert hits(kv, longer) == (8 if level == 2 else 0)
    kv.end("mixed")
    assert kv.provenance.reused("mixed") == {}


def test_what_found_no_room_depends_on_nothing_yet() -> None:
    """Guards against a request that waits through a burst at level 1 and counts as degraded ever after."""
    kv = KVModel()
    kv.begin(7)
    kv.finish()
    kv.set_level(1)
    assert kv.step(make_request("big", [3] * 20))
    assert not kv.step(make_request("waits", PROMPT))
    assert kv.provenance.span("waits") == CLEAN
    kv.end("big")
    kv.set_level(0)
    waiting = make_request("waits", PROMPT)
    assert kv.step(waiting) and kv.provenance.span("waits") == CLEAN


def test_a_block_that_is_written_anew_is_of_its_new_level() -> None:
    """Guards against a block that stays degraded after it was evicted and written again at level 0."""
    kv = KVModel("any")
    kv.begin(7)
    kv.finish()
    kv.set_level(1)
    assert kv.step(make_request("old", PROMPT))
    blocks = kv.pool.blocks[1:3]
    assert all(kv.provenance.block_span(b) == Span(1, 1) for b in blocks)
    kv.end("old")
    kv.set_level(0)
    assert kv.step(make_request("new", [6] * 23))
    assert any(b.block_hash is not None for b in blocks)
    assert all(kv.provenance.block_span(b) == CLEAN for b in kv.pool.blocks if b.block_hash is not None)


def test_a_degraded_block_that_was_unmapped_is_left_alone() -> None:
    """Guards against evicting, by the id of a block that is gone, the hashes of the one that has it now."""
    kv = KVModel()
    kv.set_level(1)
    fillers = [make_request(f"fill{i}", [9, i] * 8) for i in range(6)]
    for request in (*fillers, make_request("tail", PROMPT)):
        assert kv.step(request)
    for request in fillers:
        kv.end(request.request_id)
    kv.end("tail")
    kv.begin(20)
    assert kv.advance(99) == 0
    kv.finish()
    kv.port.grow(40)
    kv.pool.cached_block_hashes_by_block[25] = {b"of the new block 25"}  # type: ignore[arg-type]
    kv.set_level(0)
    assert 25 in kv.pool.cached_block_hashes_by_block


def test_clean_hits_of_a_deeper_level_count() -> None:
    """Guards the rule `exact`: a request that demands level 0's blocks at level 2 writes KV that depends on both."""
    kv = KVModel("exact")
    assert kv.step(make_request("clean", PROMPT))
    kv.end("clean")
    kv.set_level(2)
    kv.provenance.demand_full_precision("mixed")
    assert kv.step(make_request("mixed", [*PROMPT, *PROMPT]))
    assert kv.provenance.span("mixed") == Span(0, 2)
    assert kv.provenance.reused("mixed") == {}


def test_partial_entries_follow_the_same_rules() -> None:
    """Guards against the second way into vLLM's prefix cache, which block hashes finer than blocks use."""
    kv = KVModel()
    kv.set_level(1)
    request = make_request("r", [1, 2, 3, 4])
    assert kv.step(request)
    block = kv.pool.blocks[30]
    assert kv.pool.cache_partial_block(request, block, 4, 0, 4) == block.block_hash
    assert block.block_hash is not None
    kv.set_level(0)
    kv.provenance.sweep()
    assert block.block_hash is None
    assert kv.pool.cache_partial_block(request, block, 4, 0, 4) is None
    assert block.block_hash is None
    fresh = make_request("fresh", [5, 6, 7, 8])
    assert kv.pool.cache_partial_block(fresh, block, 4, 0, 4) == block.block_hash
    assert not kv.provenance._written


def test_stale_entries_are_forgotten() -> None:
    """Guards against books that grow with every block that was ever cached."""
    kv = KVModel("any")
    kv.set_level(1)
    for number in range(50):
        written_at(kv, 1, [number] * 20)
    assert len(kv.provenance._written) <= 2 * len(kv.pool.blocks)
    gone: list[Any] = []
    for _ in range(500):  # those of blocks that were unmapped, and made anew
        gone.append(SimpleNamespace(block_hash=b"hash"))
        kv.provenance._remember(gone[-1], Span(1, 1))
        gone[-1].block_hash = None
    assert len(kv.provenance._written) <= 2 * len(kv.pool.blocks)


@pytest.mark.parametrize("level", [0, 1])
def test_cached_blocks_are_unchanged_by_the_wrapper(level: int) -> None:
    """Guards against a call-through that loses an argument or caches more than it was told to."""
    kv = KVModel()
    kv.set_level(level)
    assert kv.step(make_request("r", PROMPT))
    assert [b.block_id for b in kv.pool.blocks if b.block_hash is not None] == [1, 2]


# ---- receipts ----


def asking(name: str, tokens: list[int], **extra: Any) -> Any:
    request = make_request(name, tokens)
    request.sampling_params.extra_args = extra
    return request


def served(kv: KVModel, receipts: Receipts, request: Any, levels: list[int]) -> dict[str, Any] | None:
    """Receipt of a request whose prompt runs at the first level and one more token at each of the others."""
    receipts.on_arrival(request)
    for number, level in enumerate(levels):
        kv.set_level(level)
        if number:
            receipts.before_outputs(levels[number - 1])
            request.append_output_token_ids(number)
        before = request.num_computed_tokens
        known = kv.manager.get_computed_blocks(request)[1] if before == 0 else before
        assert kv.step(request)
        scheduled = {request.request_id: request.num_computed_tokens - known}
        receipts.on_scheduled(scheduled, level, () if number else scheduled)
    receipts.before_outputs(levels[-1])
    request.append_output_token_ids(0)
    receipts.on_finish(request)
    kv.end(request.request_id)
    output = SimpleNamespace(request_id=request.request_id, finish_reason=1, kv_transfer_params=None)
    running = SimpleNamespace(request_id="other", finish_reason=None, kv_transfer_params=None)
    receipts.attach([running, output])
    assert running.kv_transfer_params is None
    return None if output.kv_transfer_params is None else output.kv_transfer_params["morphserve"]


def test_a_receipt_says_what_the_answer_depends_on() -> None:
    """Guards against a receipt that leaves out reused blocks, levels in between, or the last token."""
    kv = KVModel("any")
    receipts = Receipts(kv.provenance, BLOCK)
    written_at(kv, 0)
    written_at(kv, 2, [*PROMPT[:8], 4, 4, 4, 4, 4])
    request = asking("r", [*PROMPT[:8], 4, 4, 4, 4, 5], **{RECEIPT_ARG: 1})
    assert served(kv, receipts, request, [1, 1, 0]) == {
        "demanded": "any",
        "reuse_rule": "any",
        "reused_tokens": {"0": 8, "2": 4},
        "computed_tokens": {"0": 1, "1": 2},
        "output_tokens": {"0": 1, "1": 2},
        "deepest_level": 2,
        "full_precision": False,
    }


def test_levels_by_token_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: tokens told in another order than they came; a receipt that grows with each change of the level."""
    for most, expected in ((1000, [[1, 2], [0, 1], [2, 2]]), (2, [[1, 2], [2, 3]])):
        monkeypatch.setattr("morphserve.integration.engine.requests.receipts._MAX_RUNS", most)
        kv = KVModel("any")
        receipts = Receipts(kv.provenance, BLOCK)
        receipt = served(kv, receipts, asking("r", PROMPT, **{RECEIPT_ARG: "tokens"}), [1, 1, 0, 2, 2])
        assert receipt is not None and receipt["token_levels"] == expected
        assert receipt["output_tokens"] == {"0": 1, "1": 2, "2": 2}


def test_a_receipt_proves_full_precision() -> None:
    """Guards against a demand that is ignored, and against a proof that does not look at the cache."""
    kv = KVModel("any")
    receipts = Receipts(kv.provenance, BLOCK)
    written_at(kv, 1)
    loose = served(kv, receipts, asking("loose", PROMPT, **{RECEIPT_ARG: 1}), [0])
    assert loose is not None and loose["reused_tokens"] == {"1": 8} and not loose["full_precision"]
    strict = served(kv, receipts, asking("strict", PROMPT, **{PRECISION_ARG: "full"}), [0])
    assert strict is not None and strict["reused_tokens"] == {} and strict["full_precision"]
    assert strict["demanded"] == "full" and strict["computed_tokens"] == {"0": 9}


def test_a_precision_that_is_not_known_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a client that fills the disk of the log, by a line a request or by a line of megabytes; an id that a
    client has chosen, with a line in it that looks like another's."""
    kv = KVModel()
    receipts = Receipts(kv.provenance, BLOCK)
    logged = logging.getLogger("test.receipts")
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("morphserve.integration.engine.requests.receipts.logger", logged)
        for name in ("r\nERROR all is lost", "s", "t"):
            request = asking(name, PROMPT, **{PRECISION_ARG: "half " * 1_000_000})
            told = served(kv, receipts, request, [0])
            assert told is not None and "known is 'full'" in told["error"] and len(told["error"]) < 250
    (line,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in line and len(line) < 400


def test_a_life_that_was_preempted_does_not_count() -> None:
    """Guards against a receipt that adds up KV which is long gone."""
    kv = KVModel()
    receipts = Receipts(kv.provenance, BLOCK)
    kv.set_level(1)
    request = asking("r", PROMPT, **{RECEIPT_ARG: 1})
    receipts.on_arrival(request)
    assert kv.step(request)
    receipts.on_scheduled({"r": 9}, 1, ["r"])
    kv.set_level(0)
    kv.preempt("r")
    request.num_preemptions += 1
    assert kv.step(request)
    receipts.on_scheduled({"r": 9}, 0, ["r"])
    receipts.on_finish(request)
    output = SimpleNamespace(request_id="r", finish_reason=1, kv_transfer_params=None)
    receipts.attach([output])
    assert output.kv_transfer_params["morphserve"]["computed_tokens"] == {"0": 9}


def test_who_asks_for_nothing_gets_nothing() -> None:
    """Guards against fields that appear in answers nobody asked for them."""
    kv = KVModel()
    receipts = Receipts(kv.provenance, BLOCK)
    assert served(kv, receipts, asking("a", PROMPT, other=1), [0]) is None
    assert served(kv, receipts, make_request("b", PROMPT), [0]) is None
    receipts.on_arrival(make_request("c", PROMPT))
    assert not receipts._drafts, "nor does it cost anything"


class Counted(dict[str, Any]):
    """Says how often somebody walks through it."""

    walks = 0

    def _walk(self, *_: Any) -> Any:
        Counted.walks += 1
        return dict.values(self)

    def items(self) -> Any:
        self._walk()
        return super().items()

    __iter__ = values = keys = _walk


def test_a_step_costs_the_same_however_many_want_a_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: 10,000 requests with receipts, waiting or running, each looked at twice in every step of everybody."""
    monkeypatch.setattr(Counted, "walks", 0)
    receipts = Receipts(KVModel().provenance, BLOCK)
    receipts._drafts, receipts._begun = Counted(), Counted()
    for number in range(100):
        request = asking(str(number), PROMPT, **{RECEIPT_ARG: 1})
        receipts.on_arrival(request)
        if number % 2:
            request.num_computed_tokens = 9
            receipts.on_scheduled({str(number): 9}, 0, [str(number)])
    for _ in range(10):
        receipts.on_scheduled({"1": 1}, 0, [])
        receipts.before_outputs(0)
    assert Counted.walks == 0 and len(receipts._begun) == 50
    receipts.on_scheduled({"1": 1}, 2, [])
    receipts.before_outputs(2)
    assert Counted.walks == 2, "at a change of the level, and those that have begun"


def test_a_precision_nobody_knows_is_named() -> None:
    """Guards against a typing error that silently drops the demand."""
    kv = KVModel()
    receipts = Receipts(kv.provenance, BLOCK)
    receipt = served(kv, receipts, asking("r", PROMPT, **{PRECISION_ARG: "ful"}), [0])
    assert receipt is not None and "'ful'" in receipt["error"] and receipt["demanded"] == "any"


def test_a_precision_nobody_knows_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a client that fills the log: a warning a request, or one as long as what it sent."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    kv = KVModel()
    receipts = Receipts(kv.provenance, BLOCK)
    for number in range(5):
        receipts.on_arrival(asking(f"r{number}", PROMPT, **{PRECISION_ARG: "x" * 10_000}))
    warnings = [record for record in records_of(caplog) if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and len(warnings[0].getMessage()) < 300
