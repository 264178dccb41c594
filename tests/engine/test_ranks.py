"""Two tensor-parallel ranks: they morph together, or not at all.

The ranks do not hold the same number of bytes, see `make_model`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine import oracle, rank_probe
from engine.harness import ScriptPolicy, engine, follow, install, kv_script, morph_of, settle, stock
from engine.rank_harness import (
    CONFIG,
    NUM_LAYERS,
    NUM_TOKENS,
    PARALLEL,
    PROMPTS,
    RESIZES,
    ROUNDS,
    W4,
    W8,
    go,
    needs_two_cores,
    rpc,
    run,
    scripted,
)

from morphserve.errors import EngineLostError
from morphserve.residence.host_memory import FREED_WEIGHTS_RETURN
from policies.types import Decision, Signals

pytestmark = needs_two_cores


@pytest.fixture(scope="module")
def stock_rounds(tiny_llama: Path, two_cores: None) -> list[Any]:
    """The same prompts twice (the second time with prefix hits), from stock vLLM on two ranks."""
    return stock(tiny_llama, [PROMPTS, PROMPTS], NUM_TOKENS, **PARALLEL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="module")
def first(tiny_llama: Path, cache: Path, stock_rounds: list[Any]) -> dict[str, Any]:
    """What an engine did that started with an empty cache: files it wrote, tokens under the script."""
    with engine(tiny_llama, cache, CONFIG, **PARALLEL) as llm:
        found = {"files": rpc(llm, rank_probe.stored_files), **scripted(llm)}
        return {**found, "moved_by_half": moved_by_half(llm), "lost": lost(llm)}


def moved_by_half(llm: Any) -> dict[str, Any]:
    """What an engine answers at W4 whose restore meets a rank that moves live blocks by half, and at level 0 then.

    `expected` is what it answers when everything is computed again at that moment for no reason.
    """
    morph = morph_of(llm)
    found = {}
    go(llm, W4)
    restore = RestoreOfLiveBlocks(llm)
    rpc(llm, rank_probe.half_moved, 0)  # the rank whose tokens count
    for name, policy in (("answers", restore), ("expected", None)):
        llm.reset_prefix_cache()
        install(llm, policy or ComputedAgain(llm, restore.asked_at))
        found[name] = [run(llm, prompts) for prompts in ROUNDS]
        rpc(llm, rank_probe.heal)
        found |= {"errors": dict(morph.controller.counters.errors)}
    go(llm, 0)
    llm.reset_prefix_cache()
    return {**found, "after": run(llm, PROMPTS)}


class RestoreOfLiveBlocks(ScriptPolicy):
    """W4 until live blocks lie where a level less has none: then that level."""

    def __init__(self, llm: Any) -> None:
        super().__init__({0: W4})
        morph = morph_of(llm)
        self._blocks = morph.pool._pool.blocks
        self._end = morph.runtime.ladder[W4 - 1].num_kv_blocks
        self.asked_at = -1

    def decide(self, signals: Signals) -> Decision:
        if self.asked_at < 0 and any(block.ref_cnt for block in self._blocks[self._end :]):
            self.asked_at = self.count
            self.script[self.count] = W4 - 1
        return super().decide(signals)


class ComputedAgain(ScriptPolicy):
    """W4, and at one decision all that runs is preempted and computed again."""

    def __init__(self, llm: Any, at: int) -> None:
        super().__init__({0: W4})
        self._discard, self._at = morph_of(llm).pool.discard_contents, at

    def decide(self, signals: Signals) -> Decision:
        if self.count == self._at:
            self._discard()
        return super().decide(signals)


def lost(llm: Any) -> list[str]:
    """What an engine says of which one rank could not switch its layers, and when it is asked once more."""
    rpc(llm, rank_probe.fail_switch, 1)
    follow(llm, {0: 0, 6: W8})
    said = []
    for _ in range(2):
        with pytest.raises(EngineLostError) as raised:
            run(llm, PROMPTS)
        said.append(str(raised.value))
    return said


@pytest.fixture(scope="module")
def llm(tiny_llama: Path, cache: Path, first: dict[str, Any]) -> Iterator[Any]:
    # `first` has ended: two engines at once would share the cores.
    with engine(tiny_llama, cache, CONFIG, **PARALLEL) as started:
        yield started


@pytest.fixture(autouse=True)
def level_zero(llm: Any) -> Iterator[None]:
    """Every test starts and ends idle at level 0, with an empty prefix cache and healthy ranks."""
    llm.reset_prefix_cache()
    yield
    rpc(llm, rank_probe.heal)
    go(llm, 0)
    assert not morph_of(llm).controller.failed


@contextmanager
def truncated(path: Path) -> Iterator[None]:
    """While inside, the file has lost its end."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    try:
        yield
    finally:
        path.write_bytes(whole)


def state(llm: Any) -> list[tuple[dict[int, str], int, int]]:
    """(formats, mapped KV bytes, staged bytes) of each rank."""
    ranks = rpc(llm, "morphserve_memory")
    return [(rank["formats"], rank["kv_mapped_bytes"], rank["staging_bytes"]) for rank in ranks]


def aborted(logged: pytest.LogCaptureFixture) -> list[str]:
    """What was said aloud about transitions that failed."""
    lines = [r.getMessage() for r in logged.records if r.levelno >= logging.WARNING]
    return [line for line in lines if line.startswith("morph")]


def test_each_rank_has_variants_of_its_own_slices(llm: Any, first: dict[str, Any]) -> None:
    """Guards: ranks overwrite or read each other's files, or a second start packs everything again."""
    files = rpc(llm, rank_probe.stored_files)
    assert files == first["files"]
    assert [len(found) for found in files] == [3 * NUM_LAYERS] * 2
    directories = [{Path(path).parent for path in found} for found in files]
    assert [len(found) for found in directories] == [1, 1] and directories[0] != directories[1]


def test_answers_do_not_come_of_blocks_that_one_rank_has_moved_by_half(
    first: dict[str, Any], stock_rounds: list[Any]
) -> None:
    """Guards: a server that goes on, healthy, with KV in the wrong blocks; or that loses the requests that run."""
    found = first["moved_by_half"]
    assert found["errors"] == {"kv_unknown": 1}
    assert found["answers"] == found["expected"]
    assert [tokens for tokens, _ in found["after"]] == [tokens for tokens, _ in stock_rounds[0]]


def test_ranks_of_two_levels_answer_nothing(first: dict[str, Any]) -> None:
    """Guards: a server that goes on, healthy, with ranks at different levels after one has failed its commit."""
    for said in first["lost"]:
        assert "rank 1: OSError: planted" in said and "the engine ends" in said


def test_level_zero_is_published_on_both(llm: Any) -> None:
    """Guards rule 1 at start: the scheduler has blocks that one rank has not mapped."""
    ranks = rpc(llm, "morphserve_describe")
    assert [rank.rank for rank in ranks] == [0, 1]
    assert ranks[0].layer_bytes["base"] == ranks[1].layer_bytes["base"]
    assert ranks[0].layer_bytes["w8"] > ranks[1].layer_bytes["w8"], "the model was to make the ranks unequal"
    status = morph_of(llm).controller.status()
    assert (status["level"], status["num_kv_blocks"]) == (0, 49)
    for memory in rpc(llm, "morphserve_memory"):
        assert memory["kv_mapped_bytes"] == 49 * morph_of(llm).runtime.kv_block_bytes


def test_restored_is_stock(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards rule 3 on two ranks: one of them restores other weights, or does not swap at all."""
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


def test_ranks_agree_in_every_step(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards rules 4 and 7: a rank that lags, that skips a command, or that holds more than at level 0."""
    morph = morph_of(llm)
    before_schedule, seen = morph.before_schedule, []

    def observed() -> None:
        before_schedule()
        ranks = rpc(llm, "morphserve_memory")
        assert ranks[0]["formats"] == ranks[1]["formats"]
        assert ranks[0]["kv_mapped_bytes"] == ranks[1]["kv_mapped_bytes"]
        assert min(rank["kv_mapped_bytes"] for rank in ranks) >= morph.pool.num_kv_blocks * block_bytes
        seen.append((tuple(ranks[0]["formats"].values()), ranks[0]["kv_mapped_bytes"] // block_bytes))

    block_bytes = morph.runtime.kv_block_bytes
    monkeypatch.setattr(morph, "before_schedule", observed)
    follow(llm, {0: 0, 4: W8, 10: W4, 24: 2, 34: 0})
    run(llm)
    settle(llm, 0)
    ladder = morph.runtime.ladder
    assert {(level.layer_formats, level.num_kv_blocks) for level in ladder} <= set(seen)


def test_each_rank_holds_what_the_ledger_says(llm: Any) -> None:
    """Guards rule 4: KV is granted for bytes that rank 0 has freed and rank 1 has not."""
    start = rpc(llm, "morphserve_memory")
    described = rpc(llm, "morphserve_describe")
    for level in (2, W8, 5, W4, 1, 0):
        go(llm, level)
        level_row, ledgers = morph_of(llm).runtime.ladder[level], morph_of(llm).controller.status()["ledgers"]
        assert level_row.weight_bytes == max(ledger["weights_bytes"] for ledger in ledgers)
        ranks = zip(rpc(llm, "morphserve_memory"), start, described, ledgers, strict=True)
        for memory, before, rank, ledger in ranks:
            own = sum(rank.layer_bytes[fmt][layer] for layer, fmt in enumerate(level_row.layer_formats))
            assert memory["weight_bytes"] == own == ledger["weights_bytes"]
            assert memory["kv_resident_bytes"] == memory["kv_mapped_bytes"] == ledger["kv_blocks_bytes"]
            assert memory["staging_bytes"] == 0
            held = memory["weight_bytes"] + memory["kv_mapped_bytes"]
            assert held <= before["weight_bytes"] + before["kv_mapped_bytes"]


@pytest.mark.skipif(not FREED_WEIGHTS_RETURN, reason="not glibc's allocator")
def test_resident_memory_follows(llm: Any) -> None:
    """Guards: freed weights stay resident on one rank. At W4 they are two thirds of what is morphed."""
    run(llm)
    for level in (W8, 0):  # the heap has taken what it takes
        go(llm, level)
    rpc(llm, "morphserve_trim")
    start = rpc(llm, "morphserve_memory")
    freed = morph_of(llm).runtime.ladder[0].weight_bytes - morph_of(llm).runtime.ladder[W4].weight_bytes
    for level in (W4, 0, W8, 0):
        go(llm, level)
        rpc(llm, "morphserve_trim")
        for memory, before in zip(rpc(llm, "morphserve_memory"), start, strict=True):
            held = sum(memory[key] - before[key] for key in ("weight_bytes", "kv_mapped_bytes"))
            assert abs(memory["anonymous"] - before["anonymous"] - held) < freed / 2


def test_resizing_is_invisible(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards rules 1 and 2 on two ranks: a token from the wrong block across grows and migrating shrinks."""
    run(llm, ROUNDS[1])  # its blocks stay cached: the next requests take those further up, which must move
    for expected in stock_rounds:
        with kv_script(llm, RESIZES) as driver:
            assert run(llm) == expected
            assert driver.num_copied > 0, "no live block was moved: the test would not see a lost one"


@pytest.mark.parametrize("method", ["copy", "rewrite_block_tables"])
def test_a_rank_that_moves_nothing_is_seen(llm: Any, stock_rounds: list[Any], method: str) -> None:
    """Guards the test above: with the fault on rank 1 alone, tokens or logprobs must differ."""
    run(llm, ROUNDS[1])
    rpc(llm, rank_probe.skip, 1, f"morphserve.integration.worker.kv.RankKV.{method}")
    with kv_script(llm, RESIZES) as driver:
        assert run(llm) != stock_rounds[0]
        assert driver.num_copied > 0
    llm.reset_prefix_cache()


@pytest.mark.parametrize(
    ("level", "target", "layer", "fmt", "late"), [(0, W4, 1, "w8", 0), (W8, 0, 5, "base", 0), (0, W4, 1, "w8", 8)]
)
def test_one_rank_that_cannot_prepare_stops_all(
    llm: Any,
    stock_rounds: list[Any],
    logged: pytest.LogCaptureFixture,
    level: int,
    target: int,
    layer: int,
    fmt: str,
    late: int,
) -> None:
    """Guards the vote: rank 0 switches alone, keeps what it staged, or the KV given up is lost to both; and rank 1's
    word, where rank 0 still reads: forgotten, both would be told to switch, and the engine would end."""
    go(llm, level)
    expected, ranks, before = run(llm), state(llm), morph_of(llm).status()
    llm.reset_prefix_cache()
    path = Path(rpc(llm, rank_probe.variant_file, layer, fmt)[1])
    rpc(llm, rank_probe.read_late, 0, late)
    with truncated(path):
        follow(llm, {0: level, 4: target})
        assert run(llm) == expected
    assert state(llm) == ranks and ranks[0] == ranks[1]
    after = morph_of(llm).status()
    assert (after["level"], after["phase"], after["failed"]) == (level, "idle", False)
    assert after["num_kv_blocks"] == after["mapped_kv_blocks"] == before["num_kv_blocks"]
    name = "degrade_aborted" if target else "restore_aborted"
    assert after["transitions"][name] == before["transitions"].get(name, 0) + 1
    assert after["errors"]["prepare"] == before["errors"].get("prepare", 0) + 1
    said = aborted(logged)
    assert len(said) == 1 and f"outcome=aborted from_level={level} to_level={level} " in said[0]
    assert f"rank 1: StoreError: {path}" in said[0] and "rank 0" not in said[0]

    go(llm, target)  # with the file whole again
    level_row = dict(enumerate(morph_of(llm).runtime.ladder[target].layer_formats))
    assert [formats for formats, _, _ in state(llm)] == [level_row, level_row]
    go(llm, 0)
    llm.reset_prefix_cache()
    assert run(llm) == stock_rounds[0]


def test_blocks_that_one_rank_has_not_mapped_are_not_published(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards rule 1: rank 0's answer alone decides, or its surplus is never given back."""
    rpc(llm, rank_probe.no_memory, 1)
    go(llm, W8)
    level = morph_of(llm).runtime.ladder[W8]
    block_bytes = morph_of(llm).runtime.kv_block_bytes
    assert [mapped // block_bytes for _, mapped, _ in state(llm)] == [level.num_kv_blocks, 49]
    status = morph_of(llm).status()
    assert (status["level"], status["num_kv_blocks"], status["mapped_kv_blocks"]) == (W8, 49, 49)
    rpc(llm, rank_probe.heal)
    go(llm, 0)
    assert [mapped // block_bytes for _, mapped, _ in state(llm)] == [49, 49]
    assert run(llm) == stock_rounds[0]
    go(llm, W8)
    assert [mapped // block_bytes for _, mapped, _ in state(llm)] == [level.num_kv_blocks] * 2


def test_history_decides_tokens(llm: Any, first: dict[str, Any]) -> None:
    """Guards rule 5: the same script of swaps and migrations gives other tokens in another engine."""
    assert first["num_copied"] > 0, "no live block was moved: the script no longer reaches the tail"
    again = scripted(llm)
    assert again["runs"] == first["runs"]


@pytest.mark.skipif("ORACLE_REQUESTS" not in os.environ, reason="by hand: ORACLE_REQUESTS=500")
def test_a_mix_of_requests_is_answered_as_without_resizing(llm: Any) -> None:
    """Guards: a copy, a table, a hash or an order of commands that fails under some mix of requests only."""
    sys.stdout.write(f"oracle, two tensor-parallel ranks: {oracle.check(llm)}\n")
