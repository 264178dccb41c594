"""One rank's half of a transition: what must happen between two steps, and what goes on beside them on a device.

::

    step thread     prepare ->            ... commit: copies, tables, switch ->            ...
    background              map, copy in                                    unmap, map, clear
    answers         pending        ready      pending                                        done

A command answers at once; `outcome` says whether its second half is still under way, and is asked until it is not. On
the host the background is the step thread itself, so every command is done when it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Protocol

from quant_layers import LayerSwapper


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


class RankTransition:
    """1. Memory of KV blocks goes before memory for layers is taken, in one command and across commands.
    2. Layers switch within the call of `commit`; what takes pages or waits for a device does not, where there is one.
    3. Background work runs in the order of its commands, one at a time.
    """

    def __init__(
        self, swapper: LayerSwapper, kv: ElasticKV, background: Executor, finish: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            swapper: of this rank's layers.
            kv: its cache.
            background: with a single thread.
            finish: returns when what that thread has queued on the device is done; new blocks must be clear when they
                are published.
        """
        self._swapper = swapper
        self._finish = finish
        self._kv = kv
        self._background = background
        self._job: Future[None] | None = None

    def outcome(self) -> bool:
        """Return whether the last command's background work is still under way. May be asked again.

        Raises:
            Exception: what that work raised.
        """
        if self._job is None:
            return False
        if not self._job.done():
            return True
        self._job.result()
        return False

    def wait(self) -> None:
        """Wait for the last command's background work. For when nothing is served yet.

        Raises:
            Exception: what that work raised.
        """
        if self._job is not None:
            self._job.result()

    def prepare(self, changes: Mapping[int, str]) -> None:
        """Begin to bring layers in."""

        def bring() -> None:
            self._swapper.abort()  # of a plan whose abort never came: its engine has gone on
            self._swapper.prepare(changes)
            self._finish()  # what a kernel made of the tensors, too

        self._submit(bring)

    def abort(self) -> None:
        """Forget what is staged or about to be."""
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
        elif num_kv_blocks == self._kv.num_mapped:
            self._job = None  # blocks were copied, that is all: nothing of an earlier command is asked for again
            return

        def settle() -> None:
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
            Exception: what preparing raised: no layer has changed, but blocks that were to be unmapped are.
        """
        if num_kv_blocks < self._kv.num_mapped:
            self._kv.unmap(num_kv_blocks)
        self.prepare(changes)
        self.wait()
        self.commit(True, num_kv_blocks, switched)

    def _submit(self, work: Callable[[], None]) -> None:
        self._job = None  # what an earlier one raised goes first
        self._job = self._background.submit(work)
