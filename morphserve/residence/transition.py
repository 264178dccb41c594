"""One rank's half of a transition: what must happen between two steps, and what goes on beside them on a device.

::

    step thread     prepare ->            ... commit: copies, tables, switch ->            ...
    background              map, copy in                                    unmap, map, clear
    answers         pending        ready      pending                                        done

A command answers at once; `outcome` says whether its second half is still under way, and is asked until it is not. On
the host the background is the step thread itself; what is not there when a command ends are files that are still read
(`Reader`), and the question that finds them read does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from morphserve.residence.reader import Patience
from quant_layers import LayerSwapper

_PATIENCE = Patience()


class ElasticKV(Protocol):
    """The KV cache of one rank, for the background thread."""

    @property
    def num_mapped(self) -> int: ...

    def map(self, num_blocks: int) -> None:
        """Map up to so many, cleared, or as many as there is memory for."""
        ...

    def unmap(self, num_blocks: int) -> None:
        """Unmap down to so many, once the work that was queued before is done."""
        ...


@dataclass(frozen=True, slots=True)
class _Reading:
    """A read under way.

    Attributes:
        bytes: what it will give.
        layers: that wait for it.
        since_s: when it began.
        then: what the step thread does with it.
    """

    bytes: Future[Any]
    layers: tuple[int, ...]
    since_s: float
    then: Callable[[Any], None]


class RankTransition:
    """1. Memory of KV blocks goes before memory for layers is taken, in one command and across commands.
    2. Layers switch within the call of `commit`; what takes pages or waits for a device does not, where there is one.
    3. Background work runs in the order of its commands, one at a time.
    4. No call waits for a disk longer than `Patience.pause_s`. A read that is given up has changed nothing.
    """

    def __init__(
        self,
        swapper: LayerSwapper,
        kv: ElasticKV,
        background: Executor,
        finish: Callable[[], None] = lambda: None,
        patience: Patience = _PATIENCE,
        fence: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            swapper: of this rank's layers.
            kv: its cache.
            background: with a single thread.
            finish: returns when what that thread has queued on the device is done; new blocks must be clear when they
                are published.
            patience: with a disk.
            fence: notes what is queued on the device when a command commits; inside it, pages go once that is done.
        """
        self._swapper = swapper
        self._finish = finish
        self._kv = kv
        self._background = background
        self._patience = patience
        self._fence = fence
        self._job: Future[None] | None = None
        self._reading: _Reading | None = None

    def outcome(self) -> bool:
        """Return whether the last command's work is still under way; go on with it where it waited for a read.

        Raises:
            Exception: what that work raised; TimeoutError: files were not read in time.
        """
        if self._is_reading():
            return True
        if self._is_at_work():
            return True
        if self._job is not None:
            self._job.result()
        return False

    def wait(self) -> None:
        """Wait for the last command's background work. For when nothing is served yet.

        Raises:
            Exception: what that work raised.
        """
        if self._reading is not None:
            wait([self._reading.bytes])
            self._is_reading()
        if self._job is not None:
            self._job.result()

    def prepare(self, changes: Mapping[int, str]) -> None:
        """Begin to bring layers in."""
        self._read(changes, lambda fetched: self._bring(changes, fetched))

    def abort(self) -> None:
        """Forget what is staged or about to be."""
        self._give_up()
        self._submit(self._swapper.abort)

    def commit(self, has_layers: bool, num_kv_blocks: int, switched: Callable[[], None] = lambda: None) -> None:
        """Switch now; give and take memory beside the next steps.

        Args:
            has_layers: the plan changes layers, which are prepared.
            num_kv_blocks: to be mapped when all is done.
            switched: called within the same call, right after the layers are.
        """
        if has_layers:
            self._swapper.commit()
            switched()
        elif num_kv_blocks == self._kv.num_mapped and not self._is_at_work():
            self._job = None  # blocks were copied, that is all: nothing of an earlier command is asked for again
            return

        queued = self._fence()  # no step that comes later touches what goes: layers are switched, blocks withdrawn

        def settle() -> None:
            with queued:
                self._kv.unmap(num_kv_blocks)
                self._swapper.reclaim()
            self._kv.map(num_kv_blocks)
            self._finish()

        self._submit(settle)

    def prepare_and_commit(
        self, changes: Mapping[int, str], num_kv_blocks: int, switched: Callable[[], None] = lambda: None
    ) -> None:
        """Do both in one command, for a rank that decides alone and does its background work at once.

        Raises:
            Exception: what preparing raised, here or in `outcome`: no layer has changed, but blocks that were to be
                unmapped are.
        """
        if num_kv_blocks < self._kv.num_mapped:
            self._kv.unmap(num_kv_blocks)

        def switch(fetched: Any) -> None:
            self._bring(changes, fetched)
            self.wait()
            self.commit(True, num_kv_blocks, switched)

        self._read(changes, switch)

    # ---- files

    def _read(self, changes: Mapping[int, str], then: Callable[[Any], None]) -> None:
        """Begin to read, and go on at once where that is soon done."""
        self._give_up()
        self._job = None
        self._reading = _Reading(self._swapper.fetch(changes), tuple(changes), self._patience.clock(), then)
        wait([self._reading.bytes], self._patience.pause_s)
        self._is_reading()

    def _is_reading(self) -> bool:
        """Return whether a read is still under way; do what waits for it once it is not.

        Raises:
            TimeoutError: it takes too long, and is given up.
        """
        reading = self._reading
        if reading is None:
            return False
        if reading.bytes.done():
            self._reading = None
            reading.then(reading.bytes.result())
            return False
        waited_s = self._patience.clock() - reading.since_s
        if waited_s <= self._patience.timeout_s:
            return True
        self._give_up()
        raise TimeoutError(
            f"the files of layers {', '.join(map(str, reading.layers))} were not read in {waited_s:.1f} s, half of "
            "transition.rank_timeout_s. Is the disk under cache_dir slow, or away? Give it a local one."
        )

    def _give_up(self) -> None:
        """Forget a read: what has not begun never does, and what comes of the rest is dropped."""
        if self._reading is not None:
            self._reading.bytes.cancel()
            self._reading = None

    # ---- work beside the steps

    def _bring(self, changes: Mapping[int, str], fetched: Any) -> None:
        def bring() -> None:
            self._swapper.abort()  # of a plan whose abort never came: its engine has gone on
            self._swapper.prepare(changes, fetched)
            self._finish()  # what a kernel made of the tensors, too

        self._submit(bring)

    def _is_at_work(self) -> bool:
        """Return whether an earlier command's work is still under way, which may yet map or unmap."""
        return self._job is not None and not self._job.done()

    def _submit(self, work: Callable[[], None]) -> None:
        self._job = None  # what an earlier one raised goes first
        self._job = self._background.submit(work)
