"""A rank reads its layers beside its steps: a disk that is slow, or away, holds up neither them nor what comes next."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_world import NUM_LAYERS, World

from morphserve.residence import AtOnce, PartsKey, Patience, RankTransition, Reader, StoredParts
from quant_layers import BASE, StoreError, VariantStore


class _KV:
    """Counts blocks."""

    def __init__(self, num_mapped: int) -> None:
        self.num_mapped = num_mapped

    def map(self, num_blocks: int) -> None:
        self.num_mapped = max(self.num_mapped, num_blocks)

    def unmap(self, num_blocks: int) -> None:
        self.num_mapped = min(self.num_mapped, num_blocks)


class _Rank:
    """A rank on a host whose disk answers when it is told to, and whose clock is set by hand."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = World(directory)
        self.disk = threading.Event()
        self.began = threading.Semaphore(0)
        self.num_reads = 0
        read = StoredParts._read

        def slow(parts: StoredParts, wanted: Any) -> Any:
            self.num_reads += 1
            self.began.release()
            self.disk.wait()
            return read(parts, wanted)

        monkeypatch.setattr(StoredParts, "_read", slow)
        self.kv = _KV(10)
        self.now_s = 0.0
        patience = Patience(0.0, 5.0, lambda: self.now_s)
        self.transition = RankTransition(self.world.swapper, self.kv, AtOnce(), patience=patience)

    def let_go(self) -> None:
        """Have the disk answer, and return when all that was asked of it until now is read."""
        self.disk.set()
        source: Any = self.world.swapper._source
        source._reader.submit(lambda: None).result()


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Rank]:
    rank = _Rank(tmp_path, monkeypatch)
    yield rank
    rank.disk.set()


def test_a_rank_that_votes_answers_while_it_reads(rank: _Rank) -> None:
    """Guards: a prepare that stands between two steps until a disk answers, for ever where it is away."""
    before = rank.world.impls()
    rank.transition.prepare({0: "w8", 1: "w4"})
    assert [rank.transition.outcome() for _ in range(3)] == [True] * 3
    assert rank.world.impls() == before and rank.world.swapper.staging_bytes == 0
    rank.let_go()
    assert not rank.transition.outcome()
    assert rank.world.swapper.staging_bytes > 0
    rank.transition.commit(True, 12)
    assert rank.world.swapper.formats() == {0: "w8", 1: "w4", 2: "base"} and rank.kv.num_mapped == 12


def test_a_lone_rank_answers_while_it_reads(rank: _Rank) -> None:
    """Guards: the same where one command does all; blocks that are published before the layers that pay for them."""
    rank.transition.prepare_and_commit({0: "w8"}, 12)
    assert rank.transition.outcome() and rank.kv.num_mapped == 10
    rank.let_go()
    assert not rank.transition.outcome()
    assert rank.world.swapper.formats()[0] == "w8" and rank.kv.num_mapped == 12
    assert not rank.transition.outcome()  # asked once more, as for an answer that came late


def test_a_read_that_takes_too_long_is_given_up(rank: _Rank) -> None:
    """Guards: a transition that waits for ever for a disk; a rank that takes the read for its own when it comes."""
    before = rank.world.impls()
    rank.transition.prepare_and_commit({0: "w8", 2: "w8"}, 8)
    rank.now_s = 5.0
    assert rank.transition.outcome()
    rank.now_s = 5.1
    with pytest.raises(TimeoutError, match=r"files of layers 0, 2 were not read in 5.1 s.*cache_dir"):
        rank.transition.outcome()
    rank.transition.commit(False, 10)  # what was unmapped for it comes back
    assert not rank.transition.outcome() and rank.kv.num_mapped == 10
    rank.let_go()
    assert not rank.transition.outcome()
    assert rank.world.impls() == before and rank.world.swapper.staging_bytes == 0
    rank.transition.prepare_and_commit(dict.fromkeys(range(NUM_LAYERS), "w8"), 8)
    rank.let_go()
    assert not rank.transition.outcome() and set(rank.world.swapper.formats().values()) == {"w8"}


def test_attempts_do_not_pile_up_behind_a_disk_that_is_away(rank: _Rank) -> None:
    """Guards: a batch of layers read for each attempt of a night, when the disk is back."""
    rank.transition.prepare({0: "w8"})
    rank.began.acquire()
    for _ in range(3):
        rank.transition.abort()
        rank.transition.prepare({0: "w8"})
    rank.transition.abort()
    rank.let_go()
    assert rank.num_reads == 1  # the others were cancelled before they began


class _Later(Executor):
    """Does what it is given when it is told to, in order."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        self.jobs.append(lambda: done.set_result(work(*args, **kwargs)))
        return done

    def run(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()


def test_blocks_that_are_asked_for_while_they_go_come_back(tmp_path: Path) -> None:
    """Guards: a rank that looks at its blocks before its own work has unmapped them, and says that all are there."""
    kv, background = _KV(10), _Later()
    transition = RankTransition(World(tmp_path).swapper, kv, background)
    transition.commit(False, 8)
    transition.commit(False, 10)  # another rank had failed to move blocks
    background.run()
    assert not transition.outcome() and kv.num_mapped == 10


def test_what_comes_of_a_read_that_was_given_up_is_dropped(rank: _Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: layers in memory that no ledger knows of."""
    held: list[weakref.ref[torch.Tensor]] = []
    read = rank.world.store.read

    def noting(*arguments: Any) -> Any:
        found = read(*arguments)
        held.extend(weakref.ref(tensor) for parts in found.values() for tensor in parts.values())
        return found

    monkeypatch.setattr(rank.world.store, "read", noting)
    rank.transition.prepare({0: "w8"})
    rank.began.acquire()  # under way: it cannot be cancelled any more
    rank.transition.abort()
    rank.let_go()
    assert held and not any(tensor() is not None for tensor in held)


def test_a_file_that_never_opens_holds_up_nobody(tmp_path: Path) -> None:
    """Guards: the same on a real file, whose open does not return."""
    world = World(tmp_path)
    path = world.store.directory / world.store.entry(1, "w4").file
    path.unlink()
    os.mkfifo(path)
    transition = RankTransition(world.swapper, _KV(10), AtOnce(), patience=Patience(0.0, 1e6))
    transition.prepare({1: "w4"})
    assert transition.outcome() and world.swapper.staging_bytes == 0
    os.close(os.open(path, os.O_WRONLY))  # returns when the reader has opened it
    with pytest.raises(StoreError, match=path.name):
        transition.wait()


def test_an_error_of_a_read_is_the_answer(rank: _Rank) -> None:
    """Guards: a damaged file that leaves a rank pending, or ends its reader."""
    path = rank.world.store.directory / rank.world.store.entry(0, "w8").file
    path.write_bytes(path.read_bytes()[:-1])
    rank.transition.prepare({0: "w8"})
    rank.let_go()
    with pytest.raises(StoreError, match=path.name):
        rank.transition.outcome()
    rank.transition.prepare({1: "w8"})
    rank.let_go()
    assert not rank.transition.outcome() and rank.world.swapper.staging_bytes > 0


_HUNG = """
import os, sys
from morphserve.residence import Reader
reader = Reader()
reader.submit(lambda: open(sys.argv[1]).read())
print("ends", flush=True)
"""


def test_the_end_of_a_process_waits_for_no_disk(tmp_path: Path) -> None:
    """Guards: a server that cannot be stopped, only killed, while its cache is away."""
    os.mkfifo(tmp_path / "away")
    done = subprocess.run(
        [sys.executable, "-c", _HUNG, str(tmp_path / "away")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "ends\n"


def test_a_cancelled_job_does_not_run() -> None:
    """Guards: the reads of aborted plans, one after the other, before the one that is wanted."""
    reader, hold, ran = Reader(), threading.Event(), []
    first: Future[Any] = reader.submit(hold.wait)
    cancelled = reader.submit(ran.append, 1)
    last = reader.submit(ran.append, 2)
    assert cancelled.cancel()
    hold.set()
    last.result()
    assert first.result() and ran == [2]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_read_outlives_who_asked(fails: bool) -> None:
    """Guards: half a layer that stays in memory until the next transition, beside the KV blocks that it was to pay."""

    class Layer:
        """Stands for its tensors."""

    gone = threading.Event()

    def read() -> Layer:
        layer = Layer()
        weakref.finalize(layer, gone.set)
        if fails:
            raise StoreError("damaged")
        return layer

    reader = Reader()
    done: Future[Any] | None = reader.submit(read)
    assert done is not None and isinstance(done.exception(), StoreError) == fails
    if not fails:
        done = None
    assert gone.wait(10)


# ---- what a start makes of its files


@pytest.mark.parametrize(
    ("damage", "said"),
    [("changed", "has sha256"), ("missing", "found 'No such file or directory'"), ("other", "is not what was loaded")],
)
def test_what_is_damaged_again_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, said: str
) -> None:
    """Guards: a disk that damages what a start has just made again, and layers that are then read unseen: what was
    never verified has no digests to be held against."""
    write, num_written = VariantStore.write, 0

    def write_to_a_bad_disk(store: VariantStore, layer: int, fmt: str, tensors: Any, kernel: str = "") -> Any:
        nonlocal num_written
        num_written += 1
        if damage == "other":
            tensors = {"down": {"weight": torch.zeros(8, 8)}}
        row = write(store, layer, fmt, tensors, kernel)
        file = store.directory / row.file
        if damage == "missing":
            file.unlink()
        elif damage == "changed":
            file.write_bytes(file.read_bytes()[:-4] + bytes(4))
        return row

    def never(*_: Any) -> Any:
        raise AssertionError("nothing is built")

    monkeypatch.setattr(VariantStore, "write", write_to_a_bad_disk)
    parts = StoredParts(VariantStore.open(tmp_path, "fp"), PartsKey(tmp_path, lambda: "fp", {}, {}), never)
    parts.keep(0, BASE, lambda: {"down": {"weight": torch.ones(8, 8)}})
    with pytest.raises(StoreError, match=rf"{said}.*; delete .*, and the next start builds it again"):
        parts.seal()
    assert num_written == 2  # once more, and no more
