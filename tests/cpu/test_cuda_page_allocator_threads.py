"""`CudaPageAllocator` on a stub driver: contexts of threads, calls at the same time, and what is waited for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from cpu.cuda_stub import FakeStream, StubDriver
from cpu.cuda_stub_types import CUresult
from cpu.page_allocator_world import GRANULE, in_thread

from kv_resize import PageError


def test_each_thread_is_given_the_context_once() -> None:
    """Guards: a helper thread whose calls fail for want of a context, and a call more for each that a thread makes."""
    driver = StubDriver(2 * GRANULE, GRANULE)
    allocator = driver.allocator()
    bare = in_thread(lambda: driver.cuMemAddressReserve(GRANULE, GRANULE, 0, 0))
    assert bare == (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)

    def use() -> None:
        base, page = allocator.reserve(GRANULE), allocator.create()
        allocator.map(base, page)
        allocator.set_access(base, GRANULE)
        allocator.unmap(base)
        allocator.destroy(page)

    use()
    assert driver.calls.count("cuCtxSetCurrent") == 1
    for threads in (1, 2, 3):
        in_thread(use)
        assert driver.calls.count("cuCtxSetCurrent") == 1 + threads
    in_thread(allocator.close)
    assert driver.num_retained == 0


def test_calls_of_two_threads_do_not_overlap() -> None:
    """Guards: a page that two threads map at the same moment, each having seen that it was free."""

    class Watched:
        """A lock that tells when somebody asks for it."""

        def __init__(self, lock: Any) -> None:
            self.lock, self.asked = lock, threading.Event()

        def __enter__(self) -> None:
            self.asked.set()
            self.lock.acquire()

        def __exit__(self, *error: object) -> None:
            self.lock.release()

    driver = StubDriver(GRANULE, GRANULE)
    allocator = driver.allocator()
    base, page = allocator.reserve(2 * GRANULE), allocator.create()
    allocator._lock = lock = Watched(allocator._lock)  # type: ignore[assignment]
    real_map = driver.cuMemMap
    outcome: list[str] = []

    def second() -> None:
        try:
            allocator.map(base + GRANULE, page)
        except PageError as e:
            outcome.append(str(e))

    thread = threading.Thread(target=second, daemon=True)

    def while_mapping(*args: Any) -> Any:
        lock.asked.clear()
        thread.start()
        assert lock.asked.wait(20)
        return real_map(*args)

    driver.cuMemMap = while_mapping  # type: ignore[method-assign]
    allocator.map(base, page)
    thread.join(20)
    assert allocator.mapped == {base: page}
    assert outcome and "in use" in outcome[0]


def test_wait_is_for_what_was_queued_before() -> None:
    """Guards: pages unmapped under a step on the second stream; a wait that never ends because steps go on being
    queued; and other threads locked out for as long as a step takes."""
    driver = StubDriver(2 * GRANULE, GRANULE)
    streams = [FakeStream(), FakeStream()]
    allocator = driver.allocator(streams)
    streams[0].num_queued, streams[1].num_queued = 3, 5

    def more() -> None:
        for stream in streams:
            stream.num_queued += 1
        in_thread(allocator.create)

    driver.while_waiting = more
    in_thread(allocator.wait)
    assert [stream.num_done for stream in streams] == [3, 5]
    assert allocator.num_created == 2


def test_behind_a_fence_one_wait_is_for_what_was_queued_then() -> None:
    """Guards: a level whose half layers each wait for the step that was queued a moment ago; a fence that holds in
    another thread, or for ever; one that lets pages go before the steps that were queued when it was put up."""
    driver = StubDriver(2 * GRANULE, GRANULE)
    stream = FakeStream()
    allocator = driver.allocator([stream])
    stream.num_queued = 3
    fence = allocator.fence()
    stream.num_queued = 9
    with fence:
        allocator.wait()
        allocator.wait()
        assert stream.num_done == 3 and driver.calls.count("record") == 1
        in_thread(allocator.wait)
        assert stream.num_done == 9
    stream.num_queued = 11
    allocator.wait()
    assert stream.num_done == 11


def test_a_fence_that_cannot_be_put_up_leaves_the_waiting_to_later() -> None:
    """Guards: an error between two steps, out of a commit that cannot fail any more."""
    driver = StubDriver(2 * GRANULE, GRANULE)
    stream = FakeStream()
    allocator = driver.allocator([stream])
    stream.num_queued = 2
    driver.fail_at = len(driver.calls)
    with allocator.fence():
        allocator.wait()
    assert stream.num_done == 2


def test_a_thread_that_got_no_context_asks_again() -> None:
    """Guards: a helper thread that is taken to have a context since it once asked for one, and fails for ever."""
    driver = StubDriver(GRANULE, GRANULE)
    allocator = driver.allocator()

    def twice() -> int:
        with pytest.raises(PageError, match="cuCtxSetCurrent to that of device 0: CUDA_ERROR_UNKNOWN"):
            allocator.create()
        return allocator.create()

    driver.fail_at = len(driver.calls)
    assert in_thread(twice) == allocator.num_created == 1
