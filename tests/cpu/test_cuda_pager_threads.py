"""`CudaPager` on a stub driver: contexts of threads, calls at the same time, and what is waited for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from cpu.cuda_stub import FakeStream, StubDriver
from cpu.cuda_stub_types import CUresult
from cpu.pager_world import GRANULE, in_thread

from kv_resize import PagerError


def test_each_thread_is_given_the_context_once() -> None:
    """Guards: a helper thread whose calls fail for want of a context, and a call more for each that a thread makes."""
    driver = StubDriver(2 * GRANULE, GRANULE)
    pager = driver.pager()
    bare = in_thread(lambda: driver.cuMemAddressReserve(GRANULE, GRANULE, 0, 0))
    assert bare == (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)

    def use() -> None:
        base, page = pager.reserve(GRANULE), pager.create()
        pager.map(base, page)
        pager.set_access(base, GRANULE)
        pager.unmap(base)
        pager.destroy(page)

    use()
    assert driver.calls.count("cuCtxSetCurrent") == 1
    for threads in (1, 2, 3):
        in_thread(use)
        assert driver.calls.count("cuCtxSetCurrent") == 1 + threads
    in_thread(pager.close)
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
    pager = driver.pager()
    base, page = pager.reserve(2 * GRANULE), pager.create()
    pager._lock = lock = Watched(pager._lock)  # type: ignore[assignment]
    real_map = driver.cuMemMap
    outcome: list[str] = []

    def second() -> None:
        try:
            pager.map(base + GRANULE, page)
        except PagerError as e:
            outcome.append(str(e))

    thread = threading.Thread(target=second, daemon=True)

    def while_mapping(*args: Any) -> Any:
        lock.asked.clear()
        thread.start()
        assert lock.asked.wait(20)
        return real_map(*args)

    driver.cuMemMap = while_mapping  # type: ignore[method-assign]
    pager.map(base, page)
    thread.join(20)
    assert pager.mapped == {base: page}
    assert outcome and "in use" in outcome[0]


def test_wait_is_for_what_was_queued_before() -> None:
    """Guards: pages unmapped under a step on the second stream; a wait that never ends because steps go on being
    queued; and other threads locked out for as long as a step takes."""
    driver = StubDriver(2 * GRANULE, GRANULE)
    streams = [FakeStream(), FakeStream()]
    pager = driver.pager(streams)
    streams[0].num_queued, streams[1].num_queued = 3, 5

    def more() -> None:
        for stream in streams:
            stream.num_queued += 1
        in_thread(pager.create)

    driver.while_waiting = more
    in_thread(pager.wait)
    assert [stream.num_done for stream in streams] == [3, 5]
    assert pager.num_created == 2


def test_a_thread_that_got_no_context_asks_again() -> None:
    """Guards: a helper thread that is taken to have a context since it once asked for one, and fails for ever."""
    driver = StubDriver(GRANULE, GRANULE)
    pager = driver.pager()

    def twice() -> int:
        with pytest.raises(PagerError, match="cuCtxSetCurrent to that of device 0: CUDA_ERROR_UNKNOWN"):
            pager.create()
        return pager.create()

    driver.fail_at = len(driver.calls)
    assert in_thread(twice) == pager.num_created == 1
