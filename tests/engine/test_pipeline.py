"""Two pipeline stages, which hold other layers each, with up to two steps under way while a level changes.

Compiled without code generation: vLLM's CPU runner cannot run stages eagerly, and this gives the same arithmetic.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import oracle, rank_probe
from engine.harness import KVDriver, engine, follow, kv_script, morph_of, settle, stock
from engine.rank_harness import (
    CONFIG,
    NUM_TOKENS,
    PARALLEL,
    PROMPTS,
    ROUNDS,
    W4,
    W8,
    go,
    needs_two_cores,
    rpc,
    run,
    scripted,
)
from levels import swapped_layers

from morphserve.control.ranks import Plan

pytestmark = needs_two_cores

STAGES = {
    **PARALLEL,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
    "max_num_batched_tokens": 256,  # prompts come in several steps, so that two steps with requests are under way
}
LAYERS = (range(4), range(4, 6))
# By scheduled step, of which two make one token of all requests. Shrinks at even and at odd ones: where all requests
# go in one step, every second one is empty.
RESIZES = {3: 140, 8: 38, 18: 120, 23: 30, 26: 34, 36: 146, 50: 40, 61: 28, 68: 100, 85: 36, 92: 60}


@pytest.fixture(scope="module")
def uneven(two_cores: None) -> Iterator[None]:
    """Four layers on the first stage, two on the second: their KV blocks differ in size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PP_LAYER_PARTITION", "4,2")
        yield


@pytest.fixture(scope="module")
def stock_rounds(tiny_llama: Path, uneven: None) -> list[Any]:
    """The same prompts twice (the second time with prefix hits), from stock vLLM with two stages."""
    return stock(tiny_llama, [PROMPTS, PROMPTS], NUM_TOKENS, **STAGES)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, stock_rounds: list[Any]) -> Iterator[Any]:
    with engine(tiny_llama, tmp_path_factory.mktemp("variants"), CONFIG, **STAGES) as started:
        yield started


@pytest.fixture(autouse=True)
def level_zero(llm: Any) -> Iterator[None]:
    """Every test starts and ends idle at level 0, with an empty prefix cache and healthy ranks."""
    llm.reset_prefix_cache()
    yield
    rpc(llm, rank_probe.heal)
    go(llm, 0)
    assert not morph_of(llm).controller.failed


def in_flight(llm: Any) -> int:
    """Steps with requests that were sent and not read yet."""
    queue = llm.llm_engine.engine_core.engine_core.batch_queue
    return sum(bool(output.num_scheduled_tokens) for _, output, _ in queue)


class Pipelined(KVDriver):
    """Sends what shrinks without waiting, as the controller does: two steps may still be under way."""

    def __init__(self, llm: Any, script: dict[int, int]) -> None:
        super().__init__(morph_of(llm), script)
        self._llm = llm
        self.behind: list[int] = []  # steps under way when live blocks were moved

    def _commit(self, copies: tuple[tuple[int, int], ...], num_kv_blocks: int) -> None:
        if copies:
            self.behind.append(in_flight(self._llm))
        if num_kv_blocks > self._morph.pool.num_kv_blocks:
            super()._commit(copies, num_kv_blocks)
        else:
            self._morph.executor.commit(Plan(0, (), num_kv_blocks, copies))


@pytest.fixture
def pipelined(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kv_script` takes the driver above."""
    monkeypatch.setattr("engine.harness.KVDriver", lambda morph, script: Pipelined(llm, script))


def test_a_level_publishes_what_the_scarcest_stage_has_freed(llm: Any) -> None:
    """Guards rule 4 on stages: KV for bytes that another stage has freed; a stage that is not accounted for."""
    runtime = morph_of(llm).runtime
    assert [r.kv_block_bytes for r in runtime.rank_bytes] == [2 * runtime.rank_bytes[1].kv_block_bytes] + [
        runtime.rank_bytes[1].kv_block_bytes
    ]
    for rank, own in zip(runtime.rank_bytes, LAYERS, strict=True):
        for sizes in rank.layers.values():
            assert [layer for layer, size in enumerate(sizes) if size] == list(own)
    ladder = runtime.ladder
    assert swapped_layers(ladder[1]) == (0, 4), "the stages were to take turns"
    start = rpc(llm, "morphserve_memory")
    for level in (1, W8, W4, 5, 0):
        go(llm, level)
        paid = []
        ledgers = morph_of(llm).controller.status()["ledgers"]
        ranks = zip(rpc(llm, "morphserve_memory"), start, runtime.rank_bytes, LAYERS, ledgers, strict=True)
        for memory, before, rank, own, ledger in ranks:
            assert memory["formats"] == {layer: ladder[level].layer_formats[layer] for layer in own}
            assert memory["kv_mapped_bytes"] == ladder[level].num_kv_blocks * rank.kv_block_bytes
            assert memory["weight_bytes"] == ledger["weights_bytes"] == rank.weight(ladder[level].layer_formats)
            paid.append((before["weight_bytes"] - memory["weight_bytes"]) // rank.kv_block_bytes)
        assert morph_of(llm).pool.num_kv_blocks == 49 + min(paid)


def test_restored_is_stock(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards rule 3 on two stages: one of them restores other weights, or does not swap at all."""
    assert run(llm) == stock_rounds[0]
    seen = [stock_rounds[0]]
    for level in (W8, W4):
        go(llm, level)
        llm.reset_prefix_cache()
        seen.append(run(llm))
        for earlier in seen[:-1]:
            assert all(now[1] != then[1] for now, then in zip(seen[-1], earlier, strict=True))
    go(llm, 0)
    llm.reset_prefix_cache()
    assert run(llm) == stock_rounds[0]


def test_stages_meet_plans_between_the_same_two_steps(llm: Any) -> None:
    """Guards rule 7 with two steps under way: a stage that gets a command a step earlier or later than the other."""
    rpc(llm, rank_probe.record)
    tick, behind = morph_of(llm).executor._send, []

    def sent(method: str, plan: Plan) -> Any:
        behind.append(in_flight(llm))
        return tick(method, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(morph_of(llm).executor, "_send", sent)
        follow(llm, {0: 0, 4: W8, 30: W4, 60: 2, 80: 0})
        run(llm)
        settle(llm, 0)
    events = rpc(llm, rank_probe.recorded)
    assert events[0] == events[1]
    kinds = [kind for kind, _ in events[0]]
    assert len(behind) == sum(kind != "step" for kind in kinds) and max(behind) > 0, "no step was under way"
    assert {"prepare", "commit", "step"} <= set(kinds)


def test_step_times_are_learned(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the empty step that vLLM makes between two of one batch taken for idleness: no server with stages learns
    a time, though a calibration is what it may lack."""
    monitor, learned = morph_of(llm).monitor, []
    on_step = monitor.on_step

    def noting(*args: Any) -> None:
        on_step(*args)
        learned.append(monitor.last_step)

    monkeypatch.setattr(monitor, "on_step", noting)
    run(llm)
    decodes = [step for step in learned if step is not None and not step.prefill_tokens]
    assert len(decodes) > NUM_TOKENS // 2 and sum(step.num_seqs for step in decodes) > NUM_TOKENS * len(PROMPTS) // 2


def test_resizing_is_invisible(llm: Any, stock_rounds: list[Any], pipelined: None) -> None:
    """Guards rules 1 and 2 on stages: a token from the wrong block, while a step with the old ids is under way."""
    run(llm, ROUNDS[1])  # its blocks stay cached: the next requests take those further up, which must move
    for expected in stock_rounds:
        with kv_script(llm, RESIZES) as driver:
            assert run(llm) == expected
            assert driver.num_copied > 0, "no live block was moved: the test would not see a lost one"
            assert max(driver.behind) > 0, "no step was under way when blocks moved"


@pytest.mark.parametrize("method", ["copy", "rewrite_block_tables"])
def test_a_stage_that_moves_nothing_is_seen(llm: Any, stock_rounds: list[Any], method: str, pipelined: None) -> None:
    """Guards the test above: with the fault on stage 1 alone, tokens or logprobs must differ."""
    run(llm, ROUNDS[1])
    rpc(llm, rank_probe.skip, 1, f"morphserve.integration.worker.kv.RankKV.{method}")
    with kv_script(llm, RESIZES) as driver:
        assert run(llm) != stock_rounds[0]
        assert driver.num_copied > 0
    llm.reset_prefix_cache()


def test_history_decides_tokens(llm: Any) -> None:
    """Guards rule 5: the same script of swaps and migrations gives other tokens the second time."""
    first = scripted(llm)
    assert first["num_copied"] > 0, "no live block was moved: the script no longer reaches the tail"
    go(llm, 0)
    llm.reset_prefix_cache()
    assert scripted(llm)["runs"] == first["runs"]


def test_a_stage_that_swaps_a_step_late_is_seen(llm: Any) -> None:
    """Guards the test above: it must tell when one stage runs a step with the layers of the level before."""
    runs = []
    for fault in (False, False, True):
        llm.reset_prefix_cache()
        if fault:
            rpc(llm, rank_probe.swap_late, 1)
        follow(llm, {0: 0, 12: 1})
        runs.append(run(llm))
        rpc(llm, rank_probe.heal)
        go(llm, 0)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(("level", "target", "layer", "fmt"), [(0, W4, 4, "w8"), (W8, 0, 5, "base")])
def test_one_stage_that_cannot_prepare_stops_both(
    llm: Any,
    stock_rounds: list[Any],
    logged: pytest.LogCaptureFixture,
    level: int,
    target: int,
    layer: int,
    fmt: str,
) -> None:
    """Guards the vote: stage 0 switches alone, keeps what it staged, or the KV given up is lost to both."""
    go(llm, level)
    expected = run(llm)
    llm.reset_prefix_cache()
    before, status = rpc(llm, "morphserve_memory"), morph_of(llm).status()
    path = Path(rpc(llm, rank_probe.variant_file, layer, fmt)[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    try:
        follow(llm, {0: level, 4: target})
        assert run(llm) == expected
    finally:
        path.write_bytes(whole)
    after = rpc(llm, "morphserve_memory")
    for key in ("formats", "kv_mapped_bytes", "weight_bytes", "staging_bytes"):
        assert [rank[key] for rank in after] == [rank[key] for rank in before], key
    now = morph_of(llm).status()
    assert (now["level"], now["phase"], now["failed"]) == (level, "idle", False)
    assert now["num_kv_blocks"] == now["mapped_kv_blocks"] == status["num_kv_blocks"]
    said = [r.getMessage() for r in logged.records if r.levelno >= logging.WARNING and "morph r" in r.getMessage()]
    assert len(said) == 1 and f"rank 1: StoreError: {path}" in said[0]
    go(llm, 0)
    llm.reset_prefix_cache()
    assert run(llm) == stock_rounds[0]


def test_a_stage_that_lags_stops_both(llm: Any, stock_rounds: list[Any], logged: pytest.LogCaptureFixture) -> None:
    """Guards: the other stage switches, or a stage keeps what it staged; a plan given up that is prepared after all."""
    before, status = rpc(llm, "morphserve_memory"), morph_of(llm).status()
    rpc(llm, rank_probe.lag, 1, 99.0)
    follow(llm, {0: 0, 4: 1})
    assert run(llm) == stock_rounds[0]
    after, now = rpc(llm, "morphserve_memory"), morph_of(llm).status()
    for key in ("formats", "kv_mapped_bytes", "weight_bytes", "staging_bytes"):
        assert [rank[key] for rank in after] == [rank[key] for rank in before], key
    assert (now["level"], now["phase"], now["failed"], now["num_kv_blocks"]) == (0, "idle", False, 49)
    assert now["errors"]["rank_timeout"] == status["errors"].get("rank_timeout", 0) + 1
    said = [r.getMessage() for r in logged.records if r.levelno >= logging.WARNING and "morph r" in r.getMessage()]
    assert len(said) == 1 and "rank 1 took 99.0 s to prepare, transition.rank_timeout_s is 30" in said[0]
    rpc(llm, rank_probe.heal)
    late = Plan(now["revision"], ((0, "w8"), (4, "w8")), 49)
    replies = rpc(llm, "morphserve_prepare", late)
    assert [reply.ok for reply in replies] == [False, False] and "refused" in replies[0].error
    assert [reply.staging_bytes for reply in replies] == [0, 0]
    go(llm, 1)


def test_a_mix_of_requests_is_answered_as_without_resizing(llm: Any) -> None:
    """Guards: a copy, a table, a hash or an order of commands that fails under some mix of requests only."""
    sys.stdout.write(f"oracle, two pipeline stages: {oracle.check(llm, seeded=False)}\n")
