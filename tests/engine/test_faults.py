"""Whatever breaks in MorphServe, the server goes on, and says once what happened."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import rank_probe
from engine.harness import PROMPTS, engine, follow, generate, morph_of, renew, settle

from kv_resize import ElasticCache, MapError
from morphserve.control.monitor import Monitor
from morphserve.integration.engine.block_pool import VllmBlockPool
from morphserve.integration.engine.executor import RpcExecutor
from morphserve.integration.worker import state, worker
from morphserve.residence import Patience, StoredParts

NUM_TOKENS = 12
USED = PROMPTS[:4]
# A back-off longer than the test: a failed transition is one attempt, so one line in the log.
CONFIG = {"transition": {"max_layers_per_step": 5, "max_pause_ms": 1e6, "backoff_s": 600.0}}
DEGRADE = {0: 0, 3: 6}


@pytest.fixture(scope="module")
def llm(demo_model: Path, variant_cache: Path) -> Iterator[Any]:
    with engine(demo_model, variant_cache, CONFIG) as started:
        yield started


@pytest.fixture(scope="module")
def before(llm: Any) -> list[Any]:
    """Tokens and logprobs at level 0, before anything has broken."""
    return run(llm)


@pytest.fixture(autouse=True)
def healthy(llm: Any, before: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test: with the fault gone, level 0 gives what it gave before, and swaps work again."""
    yield
    monkeypatch.undo()
    renew(llm)
    follow(llm, {0: 2})
    settle(llm, 2)
    follow(llm, {0: 0})
    settle(llm, 0)
    assert run(llm) == before
    assert morph_of(llm).status()["errors"] == {}
    renew(llm)  # counters of the next test begin at 0


def run(llm: Any) -> list[Any]:
    llm.reset_prefix_cache()
    return generate(llm, USED, NUM_TOKENS)


def broken(*args: Any, **kwargs: Any) -> Any:
    raise OSError("planted")


def lines(logged: pytest.LogCaptureFixture, *texts: str) -> list[logging.LogRecord]:
    warnings = [r for r in logged.records if r.levelno >= logging.WARNING]
    return [r for r in warnings if all(text in r.getMessage() for text in texts)]


@pytest.mark.parametrize(
    ("owner", "name", "where"),
    [
        (VllmBlockPool, "grow", "controller"),
        (RpcExecutor, "_send", "controller"),
        (Monitor, "snapshot", "monitor"),
        (Monitor, "on_step", "hooks"),
        (Monitor, "on_scheduled", "hooks"),
    ],
)
def test_an_error_of_ours_does_not_reach_vllm(
    llm: Any,
    before: list[Any],
    logged: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    where: str,
) -> None:
    """Guards rule 6: an exception in controller, monitor or hooks kills the engine, or fails in silence."""
    follow(llm, DEGRADE)
    monkeypatch.setattr(owner, name, broken)
    during = run(llm)
    assert [len(tokens) for tokens, _ in during] == [NUM_TOKENS] * len(USED)
    status = morph_of(llm).status()
    assert status["failed"] and status["errors"] == {where: 1}
    said = lines(logged, "morph")
    assert len(said) == 1 and said[0].exc_info is not None and "planted" in str(said[0].exc_info[1])
    if name != "grow":  # only that one breaks after layers have switched
        assert during == before
        assert status["layers_by_format"] == {"base": 30}
    rest = run(llm)  # a server that has failed keeps serving, and does not try again
    assert rest == run(llm)
    assert morph_of(llm).status()["errors"] == {where: 1}


def test_an_error_of_the_policy_leaves_level_zero(
    llm: Any, before: list[Any], logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a policy that raises stops the server, or one that names no level moves it."""
    policy = follow(llm, {0: 0, 3: 99})
    assert run(llm) == before
    status = morph_of(llm).status()
    assert status["failed"] and status["errors"] == {"policy": 1}
    assert len(lines(logged, "policy failed; the engine stays at level 0")) == 1
    renew(llm)
    policy = follow(llm, DEGRADE)
    monkeypatch.setattr(policy, "decide", broken)
    assert run(llm) == before
    assert morph_of(llm).status()["errors"] == {"policy": 1}


def test_an_error_in_mid_restore_keeps_the_level(
    llm: Any, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a restore that breaks leaves fenced blocks, or a level that nobody knows."""
    follow(llm, {0: 6})
    settle(llm, 6)
    monkeypatch.setattr(VllmBlockPool, "advance_shrink", broken)
    follow(llm, {0: 6, 3: 0})
    assert [len(tokens) for tokens, _ in run(llm)] == [NUM_TOKENS] * len(USED)
    status = morph_of(llm).status()
    assert (status["level"], status["layers_by_format"]) == (6, {"w8": 30})
    assert status["errors"] == {"controller": 1} and status["transitions"]["restore_aborted"] == 1
    assert status["num_kv_blocks"] == status["mapped_kv_blocks"]
    morph_of(llm).pool.grow(status["num_kv_blocks"])  # by none; refused while a shrink is in progress
    assert len(lines(logged, "DRAINING failed; the engine stays at level 6")) == 1


@pytest.fixture
def truncate(healthy: None) -> Iterator[Callable[[str], str]]:
    """Cuts the end off the file of layer 2 in a format while the engine runs; puts it back afterwards."""
    store = rank_probe.store_of()
    cut: dict[Path, bytes] = {}

    def truncate_file(fmt: str) -> str:
        path = store.directory / store.entry(2, fmt).file
        cut[path] = path.read_bytes()
        path.write_bytes(cut[path][:-100])
        return f"StoreError: {path}"

    yield truncate_file
    for path, content in cut.items():
        path.write_bytes(content)


@pytest.fixture
def change(healthy: None) -> Iterator[Callable[[str], str]]:
    """Changes a byte of the file of layer 2 in a format, in place, while the engine runs; puts it back afterwards."""
    store = rank_probe.store_of()
    before: dict[Path, bytes] = {}

    def change_file(fmt: str) -> str:
        path = store.directory / store.entry(2, fmt).file
        before[path] = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes([before[path][-100] ^ 0x10]))
        return f"StoreError: {path} is damaged"

    yield change_file
    for path, content in before.items():
        path.write_bytes(content)


@pytest.fixture
def fail_in_mid_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The second layer of a swap batch fails after its linears have been built."""
    load, calls = StoredParts._load, []

    def load_layer(self: Any, layer: int, *rest: Any) -> None:
        load(self, layer, *rest)
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError("planted")

    def plant(fmt: str) -> str:
        monkeypatch.setattr(StoredParts, "_load", load_layer)
        return "MemoryError: planted"

    return plant


@pytest.mark.parametrize("fault", ["fail_in_mid_batch", "truncate", "change"])
def test_a_failed_degrade_changes_nothing(
    llm: Any, before: list[Any], logged: pytest.LogCaptureFixture, request: pytest.FixtureRequest, fault: str
) -> None:
    """Guards rule 6: half a swap batch stays staged or in use, or the failure is not reported."""
    said = request.getfixturevalue(fault)("w8")
    follow(llm, DEGRADE)
    assert run(llm) == before
    status = morph_of(llm).status()
    assert not status["failed"] and status["errors"] == {"prepare": 1}
    assert (status["level"], status["layers_by_format"]) == (0, {"base": 30})
    assert (status["transitions"], status["phase"]) == ({"degrade_aborted": 1}, "idle")
    assert status["ledger"]["staging_bytes"] == 0 and status["ranks"]["0"]["staging_bytes"] == 0
    assert status["num_kv_blocks"] == status["mapped_kv_blocks"] == 49
    aborted = lines(logged, "outcome=aborted", "to_level=0 ")
    assert len(aborted) == 1 and said in aborted[0].getMessage() and "600.0 s" in aborted[0].getMessage()


@pytest.mark.parametrize("fault", ["truncate", "change"])
def test_a_failed_restore_keeps_the_level_and_its_blocks(
    llm: Any, logged: pytest.LogCaptureFixture, request: pytest.FixtureRequest, fault: str
) -> None:
    """Guards: KV given back for a restore that failed is lost to the level that goes on; a changed base file
    restored as level 0."""
    follow(llm, {0: 6})
    settle(llm, 6)
    said = request.getfixturevalue(fault)("base")
    follow(llm, {0: 6, 3: 0})
    assert [len(tokens) for tokens, _ in run(llm)] == [NUM_TOKENS] * len(USED)
    status = morph_of(llm).status()
    assert status["transitions"]["restore_aborted"] == 1 and status["errors"] == {"prepare": 1}
    # Levels are restored from the deep end: all that do not hold layer 2 are back.
    assert status["level"] == 1 and status["layers_by_format"] == {"base": 25, "w8": 5}
    assert status["num_kv_blocks"] == status["mapped_kv_blocks"] == status["ladder"][1]["num_kv_blocks"]
    assert not status["failed"] and len(lines(logged, "outcome=aborted", "to_level=1 ")) == 1
    assert said in lines(logged, "outcome=aborted", "to_level=1 ")[0].getMessage()


def test_blocks_moved_by_half_are_computed_again(
    llm: Any, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: answers from the wrong blocks, behind a healthy server, after tables were rewritten by half."""
    follow(llm, {0: 6})
    settle(llm, 6)
    policy = follow(llm, {0: 6})
    decide = policy.decide

    def computed_again(signals: Any) -> Any:
        if policy.count == 3:  # where the fault will be
            morph_of(llm).pool.discard_contents()
        return decide(signals)

    monkeypatch.setattr(policy, "decide", computed_again)
    expected = run(llm)
    llm.reset_prefix_cache()
    free = morph_of(llm).pool._pool.free_block_queue
    free.prepend_n(sorted(free.popleft_n(free.num_free_blocks), key=lambda block: -block.block_id))  # the tail first
    rewrite, moved = worker.RankKV.rewrite_block_tables, []

    def by_half(self: Any, runner: Any, pairs: Any) -> None:
        moved.extend(pairs)
        rewrite(self, runner, pairs[1::2])
        raise OSError("planted")

    monkeypatch.setattr(worker.RankKV, "rewrite_block_tables", by_half)
    follow(llm, {0: 6, 3: 0})
    assert generate(llm, USED, NUM_TOKENS) == expected
    assert moved, "no live block was to be moved: nothing was tested"
    status = morph_of(llm).status()
    assert not status["failed"] and status["errors"] == {"kv_unknown": 1}
    assert (status["level"], status["layers_by_format"]) == (6, {"w8": 30})
    assert status["num_kv_blocks"] == status["mapped_kv_blocks"] == status["ladder"][6]["num_kv_blocks"]
    (said,) = lines(logged, "morph r")
    assert "OSError: planted; what was in the KV cache is computed again" in said.getMessage()


@pytest.fixture
def disk(healthy: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that is away until this is set."""
    back = threading.Event()
    read = StoredParts._read

    def wait_and_read(self: Any, parts: Any) -> Any:
        back.wait()
        return read(self, parts)

    monkeypatch.setattr(StoredParts, "_read", wait_and_read)
    yield back
    back.set()


def test_a_disk_that_is_away_holds_up_no_step(
    llm: Any, before: list[Any], disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: requests that wait, between two steps, for a disk; a level that never comes when it is back."""
    monkeypatch.setattr(state.rank().transition, "_patience", Patience(0.0, 1e6))
    follow(llm, DEGRADE)
    assert run(llm) == before
    status = morph_of(llm).status()
    assert (status["phase"], status["layers_by_format"]) == ("committing", {"base": 30})
    disk.set()
    settle(llm, 6)
    assert morph_of(llm).status()["errors"] == {}


def test_a_disk_that_stays_away_is_given_up(
    llm: Any, disk: threading.Event, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a restore that waits for ever, with the KV that was given back for it; more than one line a fault."""
    disk.set()
    follow(llm, {0: 6})
    settle(llm, 6)
    disk.clear()
    monkeypatch.setattr(state.rank().transition, "_patience", Patience(0.0, 0.0))
    follow(llm, {0: 6, 3: 0})
    assert [len(tokens) for tokens, _ in run(llm)] == [NUM_TOKENS] * len(USED)
    status = morph_of(llm).status()
    assert status["transitions"]["restore_aborted"] == 1 and status["errors"] == {"prepare": 1}
    assert (status["level"], status["layers_by_format"]) == (6, {"w8": 30})
    assert status["num_kv_blocks"] == status["mapped_kv_blocks"] == status["ladder"][6]["num_kv_blocks"]
    (said,) = lines(logged, "outcome=aborted", "to_level=6 ")
    assert "were not read in" in said.getMessage() and "cache_dir" in said.getMessage()


def test_memory_that_does_not_come_is_not_published(
    llm: Any, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards rule 1: blocks that a rank could not map are handed out, or the engine dies of it."""

    def no_memory(self: ElasticCache, num_blocks: int) -> None:
        raise MapError(num_blocks, self.num_mapped, self.num_mapped, "planted")

    monkeypatch.setattr(ElasticCache, "map", no_memory)
    follow(llm, DEGRADE)
    assert [len(tokens) for tokens, _ in run(llm)] == [NUM_TOKENS] * len(USED)
    status = morph_of(llm).status()
    assert not status["failed"] and status["level"] == 6
    assert status["num_kv_blocks"] == status["mapped_kv_blocks"] == 49
    assert status["counters"]["short_grows"] >= 1
    (said,) = lines(logged, "KV blocks")  # of the engine, with what the rank says; at the first level that lacks them
    wanted = {f"of the {level.num_kv_blocks} asked for" for level in morph_of(llm).runtime.ladder[1:7]}
    assert any(words in said.getMessage() for words in wanted) and "planted" in said.getMessage()
