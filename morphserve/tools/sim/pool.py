"""The block pool in numbers: how many blocks there are and are held, never which."""

from __future__ import annotations

from collections.abc import Callable

from morphserve.control import ShrinkProgress
from morphserve.errors import IllegalTransition


class SimPool:
    """A `BlockPoolPort` in constant time.

    1. `used <= num_kv_blocks - 1` at every moment: block 0 is the null block.
    2. From `begin_shrink(n)` on nothing is handed out while `n - 1` blocks or more are held.
    3. Blocks lie anywhere. Of those held, the share that expectation puts above the fence must be copied below it, as
       far as there is room; of those freed meanwhile the same share was above it.

    Attributes:
        capacity: blocks that may be held; below `used` while a shrink has not found room for all of them.
        used: blocks that live requests hold. The scheduler adds to it, and gives back through `release`.
        cached: free blocks that the prefix cache would like to keep; asked for when a shrink begins.
    """

    def __init__(self, num_kv_blocks: int) -> None:
        self._published = num_kv_blocks
        self.capacity = num_kv_blocks - 1
        self.used = 0
        self.cached: Callable[[], int] = lambda: 0
        self.preempt: Callable[[], bool] = lambda: False  # the scheduler's
        self._limit: int | None = None
        self._tail = 0  # blocks worth keeping above the fence

    @property
    def num_kv_blocks(self) -> int:
        """Published blocks, null block included."""
        return self._published

    @property
    def num_used_blocks(self) -> int:
        """Blocks that live requests hold."""
        return self.used

    def release(self, num_blocks: int) -> None:
        """Take back blocks of a request."""
        before = self.used
        self.used = before - num_blocks
        if self._tail and before:
            self._tail = max(self._tail * self.used // before, self._above(), 0)

    def grow(self, num_kv_blocks: int) -> None:
        if self._limit is not None or num_kv_blocks < self._published:
            raise IllegalTransition(
                f"grow to {num_kv_blocks} blocks with {self._published} published"
                f"{'' if self._limit is None else f', during a shrink to {self._limit}'}. Finish or cancel it first."
            )
        self._published = num_kv_blocks
        self.capacity = num_kv_blocks - 1

    def begin_shrink(self, num_kv_blocks: int) -> None:
        """Offer no more blocks than that from now on."""
        if self._limit is not None or not 1 < num_kv_blocks < self._published:
            raise IllegalTransition(
                f"shrink to {num_kv_blocks} blocks with {self._published} published"
                f"{'' if self._limit is None else f', during a shrink to {self._limit}'}. Ask for fewer, one at a time."
            )
        self._limit = num_kv_blocks
        self.capacity = num_kv_blocks - 1
        kept = self.used + min(self.cached(), max(self.capacity - self.used, 0))
        share = kept * (self._published - num_kv_blocks) // (self._published - 1)
        self._tail = max(share, self._above(), 0)

    def advance_shrink(self, max_copies: int) -> ShrinkProgress:
        """Move what finds room below the fence."""
        limit = self._fence("advance_shrink")
        room = self.capacity - max(self.used - self._tail, 0)
        moved = max(min(max_copies, self._tail, room), 0)
        self._tail -= moved
        return ShrinkProgress(tuple((limit + i, 1 + i) for i in range(moved)), self._tail)

    def discard_contents(self) -> None:
        """Refuse: ranks of the simulator do what they are told."""
        raise IllegalTransition("discard_contents: no rank fails in virtual time.")

    def preempt_one(self) -> bool:
        """Ask the scheduler to preempt the request that costs least."""
        return self.preempt()

    def finish_shrink(self) -> None:
        limit = self._fence("finish_shrink")
        if self._tail or self.used > self.capacity:
            raise IllegalTransition(
                f"finish_shrink at {limit} blocks with {self._tail} live ones above. Advance until there are none."
            )
        self._published, self._limit = limit, None

    def cancel_shrink(self) -> None:
        """Offer all published blocks again."""
        self._fence("cancel_shrink")
        self._limit, self._tail = None, 0
        self.capacity = self._published - 1

    def _above(self) -> int:
        """Return how many held blocks cannot lie below the fence."""
        return self.used - self.capacity

    def _fence(self, what: str) -> int:
        if self._limit is None:
            raise IllegalTransition(f"{what} without begin_shrink ({self._published} blocks published).")
        return self._limit
