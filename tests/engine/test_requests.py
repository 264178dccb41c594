"""Requests live through transitions, and nothing of them is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.harness import PROMPTS, ScriptPolicy, engine, follow, install, kv_script, morph_of, settle

from policies.types import Decision, Signals

NUM_REQUESTS = 16
PROMPT_TOKENS = 340  # 11 blocks of 32: sixteen of them fill level 6 (191 blocks), four fill level 0 (49)


@pytest.fixture(scope="module")
def llm(demo_model: Path, variant_cache: Path) -> Iterator[Any]:
    with engine(demo_model, variant_cache) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_left_behind(llm: Any) -> Iterator[None]:
    """Every test ends idle at level 0, with all blocks free and nothing remembered."""
    llm.reset_prefix_cache()
    yield
    follow(llm, {0: 0})
    settle(llm, 0)
    morph, scheduler = morph_of(llm), llm.llm_engine.engine_core.engine_core.scheduler
    status = morph.status()
    assert not status["failed"] and not status["errors"]
    assert (status["phase"], status["level"], status["num_kv_blocks"]) == ("idle", 0, 49)
    assert status["used_kv_blocks"] == 0 and status["ledger"]["staging_bytes"] == 0
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 48
    assert not scheduler.requests and not morph.provenance._spans and not morph._in_flight
    assert not llm.llm_engine.has_unfinished_requests()


class Watching(ScriptPolicy):
    """A script that remembers what the engine looked like."""

    def __init__(self, script: dict[int, int]) -> None:
        super().__init__(script)
        self.signals: list[Signals] = []

    def decide(self, signals: Signals) -> Decision:
        self.signals.append(signals)
        return super().decide(signals)


def watch(llm: Any, script: dict[int, int]) -> Watching:
    policy: Watching = install(llm, Watching(script))
    return policy


def submit(llm: Any, max_tokens: int) -> list[str]:
    """Sixteen requests without a common prefix."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    ids = [f"request-{i}" for i in range(NUM_REQUESTS)]
    for i, request_id in enumerate(ids):
        tokens = [1000 + i * PROMPT_TOKENS + k for k in range(PROMPT_TOKENS)]
        llm.llm_engine.add_request(request_id, {"prompt_token_ids": tokens}, params)
    return ids


def finish(llm: Any) -> dict[str, int]:
    """Step until nothing is left; output tokens by request."""
    done = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = len(output.outputs[0].token_ids)
    return done


def test_aborts_in_mid_transition(llm: Any) -> None:
    """Guards: a client that goes away while its blocks are being moved takes the transition with it."""
    follow(llm, {0: 6})
    settle(llm, 6)
    ids = submit(llm, max_tokens=30)
    follow(llm, {0: 6, 4: 0})
    controller = morph_of(llm).controller
    while controller.phase.name != "DRAINING":
        llm.llm_engine.step()
    assert morph_of(llm).pool.num_used_blocks > 167, "the tail is free: nothing would have to be moved"
    llm.llm_engine.step()
    assert controller.phase.name == "DRAINING"
    llm.llm_engine.abort_request(ids[: NUM_REQUESTS // 2])
    assert set(finish(llm).values()) == {30}
    assert controller.level < 6 and controller.effective_level < 6


def test_preemption_at_a_degraded_level(llm: Any) -> None:
    """Guards: a preempted request is lost, or is counted against a pool that has grown."""
    policy = watch(llm, {0: 6})
    settle(llm, 6)
    ids = submit(llm, max_tokens=40)
    assert finish(llm) == dict.fromkeys(ids, 40)
    assert policy.signals[-1].preemptions > 0


def test_waiting_requests_are_served_after_growth(llm: Any) -> None:
    """Guards: grown blocks are mapped and published, but nobody is admitted onto them."""
    policy = watch(llm, {0: 0, 4: 6})
    ids = submit(llm, max_tokens=30)
    assert finish(llm) == dict.fromkeys(ids, 30)
    full = [s for s in policy.signals if s.level == 0 and s.num_waiting > 0]
    assert full and max(s.num_running for s in full) == 4
    assert max(s.num_running for s in policy.signals) == NUM_REQUESTS


def test_shared_blocks_move(llm: Any) -> None:
    """Guards: of two samples that share a prompt's blocks, one keeps reading the block that moved."""
    from vllm import SamplingParams

    fillers = [{"prompt_token_ids": [9000 + i * 320 + k for k in range(320)]} for i in range(3)]
    text = "The following is the record of a meeting about the library. " * 8
    prompts = [*fillers, *(text + prompt for prompt in PROMPTS[:2])]
    short = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    pair = SamplingParams(n=2, temperature=1.0, seed=7, max_tokens=32, ignore_eos=True)
    params = [short] * 3 + [pair] * 2

    def sample() -> list[Any]:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [[c.token_ids for c in output.outputs] for output in outputs[3:]]

    expected = sample()
    assert all(len(one) == 2 and one[0] != one[1] for one in expected)
    with kv_script(llm, {0: 191, 6: 30, 12: 60, 18: 22}) as driver:
        assert sample() == expected
        assert driver.num_copied > 0


def test_receipts_come_with_the_answers(llm: Any) -> None:
    """Guards: a receipt that never leaves the engine, or full precision that reuses what a burst has left behind."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": [500 + k for k in range(100)]}  # three full blocks of 32

    def ask(**extra: Any) -> Any:
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, extra_args=extra)
        given = llm.generate([prompt], params, use_tqdm=False)[0].kv_transfer_params
        return given and given["morphserve"]

    provenance = morph_of(llm).provenance
    assert ask() is None
    llm.reset_prefix_cache()
    provenance.rule = "any"
    try:
        follow(llm, {0: 6})
        settle(llm, 6)
        burst = ask(morphserve_receipt=1)
        assert burst["computed_tokens"] == {"6": 103} and burst["output_tokens"] == {"6": 4}
        assert not burst["full_precision"]
        follow(llm, {0: 0})
        settle(llm, 0)
        after = ask(morphserve_receipt=1)
        assert after["reused_tokens"] == {"6": 96} and after["computed_tokens"] == {"0": 7}
        assert not after["full_precision"]
        strict = ask(morphserve_precision="full")
        assert strict["reused_tokens"] == {} and strict["computed_tokens"] == {"0": 103} and strict["full_precision"]
    finally:
        provenance.rule = "not_worse"


@pytest.mark.skipif(os.environ.get("OMP_NUM_THREADS") != "1", reason="by hand: on one thread batches round the same")
def test_a_shrink_without_room_may_preempt(llm: Any) -> None:
    """Guards: a request that a shrink has preempted is lost, repeats tokens, or answers otherwise."""

    def answers() -> dict[str, tuple[int, ...]]:
        found = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    found[output.request_id] = tuple(output.outputs[0].token_ids)
        return found

    submit(llm, max_tokens=40)
    expected = answers()
    llm.reset_prefix_cache()
    morph = morph_of(llm)
    runner, config = morph.controller._runner, morph.controller._runner.config
    impatient = {"kv": config.kv.model_copy(update={"max_preemptions": 3, "drain_timeout_s": 0.5})}
    # Growth without quantized layers, so that answers can be compared.
    with kv_script(llm, {0: 191}) as driver:
        submit(llm, max_tokens=40)
        for _ in range(12):
            llm.llm_engine.step()
        assert morph.pool.num_used_blocks > 150
        assert morph.pool.preempt_one() and morph.pool.preempt_one()
        assert len(morph.monitor._waiting) == 2 and morph.traffic.view().oldest_wait_s < 60
        assert answers() == expected
        assert driver.sizes
    settle(llm, 0)
    runner.config = config.model_copy(update=impatient)
    follow(llm, {0: 6})
    settle(llm, 6)
    ids = submit(llm, max_tokens=140)
    for _ in range(12):
        llm.llm_engine.step()
    follow(llm, {0: 0})
    assert finish(llm) == dict.fromkeys(ids, 140)
    assert 0 < morph.controller.counters.forced_preemptions <= 3
    runner.config = config
