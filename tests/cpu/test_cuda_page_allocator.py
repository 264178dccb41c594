"""`CudaPageAllocator` on a stub driver: failures, closing, views. What all do is in test_kv_page_allocator.py."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu.cuda_stub import FakeStream, StubDriver
from cpu.cuda_stub_types import CUresult
from cpu.page_allocator_world import GRANULE, in_thread, state

import kv_resize.cuda_driver
from kv_resize import CudaPageAllocator, PageError


class Story:
    """Every kind of call, each made again after a failure that must have changed nothing."""

    def __init__(self, driver: StubDriver) -> None:
        self.driver = driver
        self.failed: list[PageError] = []

    def run(self) -> None:
        allocator = self.attempt(self.driver.allocator, self.driver.state)

        def see() -> object:
            return state(allocator)

        base = self.attempt(lambda: allocator.reserve(3 * GRANULE), see)
        view = self.attempt(lambda: allocator.view(base, 3 * GRANULE), see)
        pages = [self.attempt(allocator.create, see) for _ in range(3)]
        for number, page in enumerate(pages[:2]):
            self.attempt(lambda a=base + number * GRANULE, p=page: allocator.map(a, p), see)  # type: ignore[misc]
        self.attempt(lambda: allocator.set_access(base, 2 * GRANULE), see)
        view[:GRANULE].fill_(8)
        self.attempt(lambda: in_thread(allocator.wait), see)
        self.attempt(lambda: in_thread(lambda: allocator.unmap(base)), see)
        self.attempt(lambda: allocator.map(base + 2 * GRANULE, pages[0]), see)
        self.attempt(lambda: allocator.set_access(base + 2 * GRANULE, GRANULE), see)
        assert (view[2 * GRANULE :] == 8).all()
        self.attempt(lambda: allocator.destroy(pages[2]), see)
        self.attempt(allocator.close, None)
        assert (allocator.mapped, allocator.accessible, allocator.num_created) == ({}, set(), 0)

    def attempt(self, call: Callable[[], Any], see: Callable[[], object] | None) -> Any:
        before = see() if see else None
        try:
            return call()
        except PageError as e:
            self.failed.append(e)
            if see:
                assert see() == before
            return call()


def test_any_call_may_fail_once() -> None:
    """Guards: books that say what the driver did not do, half a constructor, a thread that is taken to have a context,
    memory left behind by a close that failed; and errors that do not say which call it was."""
    total = None
    fail_at = -1
    while total is None or fail_at < total:
        driver = StubDriver(3 * GRANULE, GRANULE)
        driver.fail_at = fail_at if fail_at >= 0 else None
        story = Story(driver)
        story.run()
        assert driver.state() == (0, {}, {}, {}, set(), {})
        assert len(story.failed) == (fail_at >= 0)
        if total is None:
            total = len(driver.calls)
            assert total > 25
        else:
            assert driver.calls[fail_at] in str(story.failed[0])
        fail_at += 1


@pytest.mark.parametrize("code", [*list(CUresult)[1:], 12345])
def test_an_error_says_call_address_result_and_remedy(code: CUresult | int) -> None:
    """Guards: an operator who reads a number. A result that the bindings do not know comes as a bare integer."""
    driver = StubDriver(GRANULE, GRANULE)
    allocator = driver.allocator()
    base, page = allocator.reserve(GRANULE), allocator.create()
    driver.fail_at, driver.fail_code = len(driver.calls), code  # type: ignore[assignment]
    with pytest.raises(PageError) as caught:
        allocator.map(base, page)
    name = code.name if isinstance(code, CUresult) else "12345"
    first, _, remedy = str(caught.value).partition(f": {name}. ")
    assert first == f"cuMemMap of page {page} at {base:#x}" and remedy.endswith(".")


def test_remedies_are_for_results_that_exist() -> None:
    """Guards: a remedy that is never shown. That the stub's results are the driver's is in test_cuda_bindings.py."""
    assert set(kv_resize.cuda_driver._REMEDIES) <= set(CUresult.__members__)


def test_without_streams_the_devices_current_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a page allocator for which nothing is ever waited."""
    driver = StubDriver(GRANULE, GRANULE)
    stream = FakeStream()
    stream.num_queued = 2
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: {0: stream}[device])
    CudaPageAllocator(0, driver=driver, make_event=driver.make_event).wait()
    assert stream.num_done == 2


def test_close_waits_and_then_undoes_everything() -> None:
    """Guards: memory or a context that outlives the server's engine, pages unmapped under its last step, and a second
    close that fails or gives back a context that it does not hold."""
    driver = StubDriver(2 * GRANULE, GRANULE)
    with driver.allocator() as allocator:
        base = allocator.reserve(2 * GRANULE)
        allocator.map(base, allocator.create())
        allocator.set_access(base, GRANULE)
        allocator.create()
        driver.streams[0].num_queued += 1
    assert driver.state() == (0, {}, {}, {}, set(), {})
    calls = len(driver.calls)
    allocator.close()
    for call in (allocator.create, allocator.wait, lambda: allocator.reserve(GRANULE), lambda: allocator.map(base, 1)):
        with pytest.raises(PageError, match="closed"):
            call()
    assert len(driver.calls) == calls


def test_close_leaves_no_range_half_free() -> None:
    """Guards: a close that stops at the first refusal, or frees addresses that are still mapped and so loses them."""
    driver = StubDriver(3 * GRANULE, GRANULE)
    allocator = driver.allocator()
    bases = [allocator.reserve(2 * GRANULE) for _ in range(2)]
    pages = [allocator.create() for _ in range(3)]
    for base, page in zip(bases, pages, strict=False):
        allocator.map(base, page)
    driver.fail_at = len(driver.calls) + 2  # after record and synchronize: the first unmap
    with pytest.raises(PageError, match="close: 1 refused, close again. The first: cuMemUnmap of page 1"):
        allocator.close()
    assert allocator.mapped == {bases[0]: pages[0]} and set(driver.reserved) == {bases[0]}
    assert [memory.is_released for memory in driver.memories.values()] == [False]
    assert allocator.num_created == driver.num_retained == 1
    with pytest.raises(PageError, match="closed"):
        allocator.create()
    allocator.close()
    assert driver.state() == (0, {}, {}, {}, set(), {})


def test_a_page_may_be_larger_than_the_granularity() -> None:
    """Guards: pages that are mapped in parts, and addresses refused since a range begins at no multiple of a page."""
    driver = StubDriver(6 * GRANULE, GRANULE)
    for wrong, right in ((GRANULE + 1, 128), (0, 64), (-5, 64)):
        with pytest.raises(PageError, match=f"no multiple of the granularity, 64 B. Use {right}."):
            driver.allocator(page_bytes=wrong)
        assert driver.num_retained == 0
    allocator = driver.allocator(page_bytes=3 * GRANULE)
    assert allocator.granularity_bytes == 3 * GRANULE
    base = allocator.reserve(6 * GRANULE)
    assert base % allocator.granularity_bytes
    for address in (base, base + 3 * GRANULE):
        allocator.map(address, allocator.create())
    allocator.set_access(base, 6 * GRANULE)
    allocator.view(base, 6 * GRANULE).fill_(1)
    allocator.unmap(base)
    for bad in (lambda: allocator.map(base + GRANULE, 1), lambda: allocator.reserve(4 * GRANULE)):
        with pytest.raises(PageError, match="granularity"):
            bad()
    assert driver.used_bytes == 6 * GRANULE and driver.calls.count("cuMemMap") == 2


def test_a_view_keeps_the_allocator_and_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: books that are dropped under a tensor; torch asking a driver, which does not know unmapped addresses,
    what device they are on; and its refusal coming as another error than the page allocator's."""
    seen: list[Any] = []

    def as_tensor(window: Any, device: torch.device) -> torch.Tensor:
        seen.append((window, device))
        return torch.zeros(1)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    allocator = CudaPageAllocator(0, driver=StubDriver(GRANULE, GRANULE))
    base = allocator.reserve(2 * GRANULE)
    allocator.view(base + GRANULE, GRANULE)
    window, device = seen.pop()
    interface = window.__cuda_array_interface__
    assert device == torch.device("cuda:0") and interface["data"] == (base + GRANULE, False)
    assert (interface["shape"], interface["typestr"], interface["strides"]) == ((GRANULE,), "|i1", None)
    alive = weakref.ref(allocator)
    del allocator
    gc.collect()
    assert alive() is not None
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(PageError, match="Check that torch sees the device"):
            window.allocator.view(base, GRANULE)


def test_without_bindings_or_device_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an ImportError from the depth of a worker, and a wrong device number that is not named."""
    with pytest.raises(PageError, match=r"cuDeviceGet of device 3: CUDA_ERROR_INVALID_DEVICE. Check CUDA_VISIBLE"):
        CudaPageAllocator(3, driver=StubDriver(GRANULE, GRANULE))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(PageError, match="pip install cuda-bindings"):
        CudaPageAllocator(0)


def test_the_package_imports_where_cuda_does_not() -> None:
    """Guards: a CPU server that cannot start without NVIDIA's package. Torch imports it where it is installed."""
    code = "import sys; sys.modules['cuda'] = None; import kv_resize"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
