"""An error of ours within a call of vLLM's: vLLM never hears of it, and no block of unknown level is reused."""

from __future__ import annotations

from typing import Any

import pytest
from seams.pool_harness import BLOCK, KVModel, make_request

from morphserve.integration.engine.requests.receipts import PRECISION_ARG, Receipts

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]  # two full blocks and one token


def broken(*args: Any, **kwargs: Any) -> Any:
    raise OSError("planted")


def hits(kv: KVModel, name: str) -> int:
    """Tokens a new request with this prompt would take from the prefix cache."""
    return kv.manager.get_computed_blocks(make_request(name, [*PROMPT, 1]))[1]


@pytest.mark.parametrize("rule", ["any", "not_worse", "exact"])
@pytest.mark.parametrize(
    "method",
    ["_admits", "_note_found", "_begin_slots", "_end_slots", "_remember", "_remember_all", "_set_level", "_sweep"],
)
def test_an_error_of_ours_ends_reuse_and_nothing_else(
    rule: Any, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: an error in what is wrapped around vLLM's pool ends the engine, is lost in silence or met at every call;
    or KV whose level it lost is reused, at full precision even."""
    kv = KVModel(rule)
    told: list[int] = []
    kv.provenance.on_error = lambda: told.append(1)
    kv.set_level(1)
    assert kv.step(make_request("before", PROMPT)) and hits(kv, "probe") == 8
    monkeypatch.setattr(kv.provenance, method, broken)
    kv.set_level(2)
    hits(kv, "asks")
    assert kv.step(make_request("during", [3, *PROMPT]))
    kv.provenance.sweep()
    monkeypatch.undo()
    assert told == [1] and kv.provenance.failed
    assert len(caplog.records) == 1 and "no prefix is reused" in caplog.text and "planted" in caplog.text
    for level in (0, 1, 2):
        kv.set_level(level)
        name = f"later{level}"
        assert kv.step(make_request(name, PROMPT)) and hits(kv, f"probe{level}") == 0
        kv.end(name)
    for name in ("before", "during"):
        kv.end(name)
    assert told == [1]


def test_an_error_of_ours_at_a_part_of_a_block_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the same in the second way into the prefix cache, for block hashes that are finer than blocks."""
    kv = KVModel()
    kv.set_level(1)
    request = make_request("r", PROMPT[:BLOCK])
    assert kv.step(request)
    monkeypatch.setattr(kv.provenance, "_remember", broken)
    assert kv.pool.cache_partial_block(request, kv.pool.blocks[30], BLOCK, 0, BLOCK)
    assert kv.provenance.failed


def test_vllms_own_error_while_it_frees_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: blocks that vLLM has not freed, of which nobody hears because a shrink lasts."""
    kv = KVModel()
    assert kv.step(make_request("r", PROMPT))
    kv.port.begin_shrink(20)
    monkeypatch.setattr(kv.pool, "free_block_queue", None)
    with pytest.raises(AttributeError):
        kv.manager.free(kv.requests["r"])


def test_vllms_own_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an error of vLLM's that we swallow, or take for ours."""
    kv = KVModel()
    kv.set_level(1)
    monkeypatch.setattr(kv.manager, "coordinator", None)
    with pytest.raises(AttributeError):
        hits(kv, "asks")
    assert not kv.provenance.failed


def test_a_receipt_after_an_error_tells_of_no_reuse() -> None:
    """Guards: an answer that is called full precision for a prefix of which nobody knows the level."""
    kv = KVModel("any")
    receipts = Receipts(kv.provenance, BLOCK)
    kv.set_level(1)
    assert kv.step(make_request("before", PROMPT))
    kv.set_level(0)
    kv.provenance._guard(broken)
    request = make_request("r", PROMPT)
    request.sampling_params.extra_args = {PRECISION_ARG: "full"}
    receipts.on_arrival(request)
    assert kv.step(request) and request.num_computed_tokens == 9
    receipts.on_scheduled({"r": 9}, 0, ["r"])
    receipts.on_finish(request)
    receipt = receipts._sealed["r"]
    assert receipt["reused_tokens"] == {} and receipt["computed_tokens"] == {"0": 9}


def test_an_error_of_ours_while_vllm_frees_is_met_by_the_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an error in the fence ends the engine within vLLM's own call, or leaves a shrink that waits for ever."""
    kv = KVModel()
    assert kv.step(make_request("r", PROMPT))
    kv.port.begin_shrink(20)
    monkeypatch.setattr(kv.port, "_balance", broken)
    kv.manager.free(kv.requests["r"])
    monkeypatch.undo()
    with pytest.raises(OSError, match="planted"):
        kv.port.advance_shrink(8)
    assert kv.port.advance_shrink(8).num_live_tail == 0
    kv.port.cancel_shrink()
