"""`PageAllocator` on an NVIDIA device, by the CUDA driver's virtual memory management."""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from kv_resize.cuda_driver import CudaDriver, access_descriptor, allocation_properties
from kv_resize.errors import PageError
from kv_resize.page_allocator import Page


class CudaPageAllocator:
    """Pages of one device.

    1. A call that raises `PageError` has changed nothing, and can be made again.
    2. A call may come from any thread. One runs at a time; only waiting for the device keeps nobody out.
    3. No call takes longer because more pages exist or are mapped elsewhere.
    4. `close` undoes what this page allocator did and nothing else; what the driver would not undo stays in the books.

    That no queued work touches a page is the caller's to see to: `wait`, then `unmap`. One dropped without `close`
    keeps its memory until the process ends.
    """

    def __init__(
        self,
        device: int,
        streams: Sequence[Any] = (),
        *,
        page_bytes: int | None = None,
        driver: Any = None,
        view: Callable[[int, int], torch.Tensor] | None = None,
        make_event: Callable[[], Any] | None = None,
    ) -> None:
        """Take hold of the device's context; no memory yet.

        Args:
            device: Its number, as torch counts.
            streams: All that work on the pages is queued to, copies and zeroing included: `wait` waits for these. None
                given: the current stream of the thread that waits, in a helper thread not the one of the model.
            page_bytes: Size of a page, a multiple of the device's granularity, for fewer calls per byte. None: the
                granularity, the minimal one. A page is what goes from weights to KV blocks: the smaller it is, the
                fewer blocks a change must make up, and the less of it is left over.
            driver: What has the functions of `cuda.bindings.driver`; None: that module.
            view: (address, size_bytes) -> int8 [size_bytes], in place of torch's view of device memory.
            make_event: An event with `record(stream)` and `synchronize()`; None: torch's.

        Raises:
            PageError: No `cuda-bindings`, no driver, no such device, or a page size that it does not have.
        """
        self._cuda = CudaDriver(device, driver)
        self._streams = tuple(streams)
        self._make_view = view or self._device_view
        self._make_event = make_event or _sleeping_event
        self._lock = threading.RLock()
        self._fenced = threading.local()  # events: what `wait` waits for in this thread, where it is inside a fence
        self._is_closed = False
        self._ranges: dict[int, int] = {}  # address -> size_bytes
        self._starts: list[int] = []  # the same addresses, sorted
        self._handles: dict[Page, Any] = {}
        self._address_of: dict[Page, int] = {}  # the inverse of `mapped`
        self._last_page = 0
        self.mapped: dict[int, Page] = {}  # address -> page
        self.accessible: set[int] = set()  # addresses of mappings
        try:
            functions = self._cuda.functions
            self._properties = allocation_properties(functions, device)
            self._access = access_descriptor(functions, device)
            option = functions.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self._alignment = int(self._cuda.call("cuMemGetAllocationGranularity", self._properties, option))
            self.granularity_bytes = _page_size(page_bytes, self._alignment)
        except Exception:
            with contextlib.suppress(PageError):
                self._cuda.release()
            raise

    @property
    def num_created(self) -> int:
        """Pages that exist."""
        return len(self._handles)

    def reserve(self, size_bytes: int) -> int:
        """Reserve a range of addresses. It stays until `close`."""
        with self._lock:
            self._check_open()
            self._check_size(size_bytes)
            about = f" of {size_bytes:,} B"
            address = int(self._cuda.call("cuMemAddressReserve", size_bytes, self._alignment, 0, 0, about=about))
            self._ranges[address] = size_bytes
            insort(self._starts, address)
            return address

    def view(self, address: int, size_bytes: int) -> torch.Tensor:
        """Return int8 [size_bytes] over reserved addresses, mapped or not. It keeps this object alive, not open."""
        with self._lock:
            self._check_open()
            start = self._start_of(address)
            if address + size_bytes > start + self._ranges[start]:
                raise PageError(f"{address:#x} to {address + size_bytes:#x} lies in no reserved range. Reserve more.")
        try:
            return self._make_view(address, size_bytes)
        except (RuntimeError, AssertionError) as e:  # torch says by the latter that it was built without CUDA
            raise PageError(f"view of {size_bytes:,} B at {address:#x}: {e}. Check that torch sees the device.") from e

    def create(self) -> Page:
        """Allocate memory on the device, mapped nowhere. Its contents are not defined."""
        with self._lock:
            self._check_open()
            about = f" of {self.granularity_bytes:,} B, {self.num_created} pages exist"
            handle = self._cuda.call("cuMemCreate", self.granularity_bytes, self._properties, 0, about=about)
            self._last_page += 1
            self._handles[self._last_page] = handle
            return self._last_page

    def destroy(self, page: Page) -> None:
        """Free a page's memory; its number is not used again."""
        with self._lock:
            self._check_open()
            self._check_page(page)
            if page in self._address_of:
                raise PageError(f"destroy page {page}: it is in use at {self._address_of[page]:#x}. Unmap first.")
            self._release(page)

    def map(self, address: int, page: Page) -> None:
        """Map a page that is mapped nowhere: the driver would map it twice; here it has one owner."""
        with self._lock:
            self._check_open()
            self._check_page(page)
            self._check_aligned(address)
            if address in self.mapped or page in self._address_of:
                raise PageError(f"map page {page} at {address:#x}: one of them is in use. Unmap first.")
            about = f" of page {page} at {address:#x}"
            self._cuda.call("cuMemMap", address, self.granularity_bytes, 0, self._handles[page], 0, about=about)
            self.mapped[address] = page
            self._address_of[page] = address

    def set_access(self, address: int, size_bytes: int) -> None:
        """Allow access to the whole range in one call of the driver."""
        with self._lock:
            self._check_open()
            self._check_aligned(address)
            self._check_size(size_bytes)
            addresses = range(address, address + size_bytes, self.granularity_bytes)
            if not all(map(self.mapped.__contains__, addresses)):
                missing = next(a for a in addresses if a not in self.mapped)
                raise PageError(f"access to {missing:#x}, where nothing is mapped. Map first.")
            about = f" to {size_bytes:,} B at {address:#x}"
            self._cuda.call("cuMemSetAccess", address, size_bytes, [self._access], 1, about=about)
            self.accessible.update(addresses)

    def unmap(self, address: int) -> None:
        """Unmap a page, which may then be mapped elsewhere."""
        with self._lock:
            self._check_open()
            if address not in self.mapped:
                raise PageError(f"unmap {address:#x}: no mapping begins there. Unmap a mapping as a whole, once.")
            self._unmap(address)

    def wait(self) -> None:
        """Wait for what is queued to the streams now; not for what is queued to them meanwhile."""
        with self._lock:
            self._check_open()
        self._wait()

    def fence(self) -> contextlib.AbstractContextManager[None]:
        """Note what is queued to the streams now. Inside the context, `wait` in its thread waits for that alone."""
        try:
            return self._behind(self._record())
        except PageError:  # as `wait` will find, where somebody can be told
            return contextlib.nullcontext()

    def close(self) -> None:
        """Wait, then unmap, destroy and free all. Tensors of `view` must not be touched any more.

        On a closed page allocator it does nothing; after a failure, what is left.

        Raises:
            PageError: Not all could be undone. Close again.
        """
        with self._lock:
            if not self._cuda.is_retained:
                return
            self._is_closed = True
            if self.mapped:
                self._wait()
            refused: list[PageError] = []
            for address in list(self.mapped):
                _note(refused, self._unmap, address)
            for page in self._handles.keys() - self._address_of.keys():
                _note(refused, self._release, page)
            for address in set(self._starts) - {self._start_of(mapping) for mapping in self.mapped}:
                _note(refused, self._free, address)
            if not refused:
                _note(refused, self._cuda.release)
            if refused:
                raise PageError(f"close: {len(refused)} refused, close again. The first: {refused[0]}")

    def __enter__(self) -> CudaPageAllocator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unmap(self, address: int) -> None:
        page = self.mapped[address]
        self._cuda.call("cuMemUnmap", address, self.granularity_bytes, about=f" of page {page} at {address:#x}")
        del self.mapped[address], self._address_of[page]
        self.accessible.discard(address)

    def _release(self, page: Page) -> None:
        self._cuda.call("cuMemRelease", self._handles[page], about=f" of page {page}")
        del self._handles[page]

    def _free(self, address: int) -> None:
        self._cuda.call("cuMemAddressFree", address, self._ranges[address], about=f" at {address:#x}")
        del self._ranges[address]
        self._starts.remove(address)

    @contextlib.contextmanager
    def _behind(self, events: Sequence[Any]) -> Iterator[None]:
        self._fenced.events = events
        try:
            yield
        finally:
            self._fenced.events = None

    def _record(self) -> list[Any]:
        """Return an event for each stream. All are recorded before one is waited for: what comes later counts on none.

        Raises:
            PageError: the device is in trouble.
        """
        with self._device_errors():
            streams = self._streams or (torch.cuda.current_stream(self._cuda.device),)
            events = [self._make_event() for _ in streams]
            for event, stream in zip(events, streams, strict=True):
                event.record(stream)
            return events

    def _wait(self) -> None:
        events = getattr(self._fenced, "events", None) or self._record()
        with self._device_errors():
            for event in events:
                event.synchronize()

    @contextlib.contextmanager
    def _device_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, AssertionError) as e:
            raise PageError(f"wait for device {self._cuda.device}: {e}. If a kernel failed, restart.") from e

    def _device_view(self, address: int, size_bytes: int) -> torch.Tensor:
        # With a device named, torch (2.9 or newer) does not ask the driver whose address it is: nobody's, while nothing
        # is mapped there.
        return torch.as_tensor(_Window(self, address, size_bytes), device=torch.device("cuda", self._cuda.device))

    def _start_of(self, address: int) -> int:
        """Return the beginning of the reserved range that holds an address."""
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._starts[index] + self._ranges[self._starts[index]]:
            raise PageError(f"{address:#x} lies in no reserved range. Reserve first.")
        return self._starts[index]

    def _check_open(self) -> None:
        if self._is_closed:
            raise PageError(f"the page allocator of device {self._cuda.device} is closed. Make a new one.")

    def _check_page(self, page: Page) -> None:
        if page not in self._handles:
            raise PageError(f"there is no page {page} among the {self.num_created} that exist. Create it first.")

    def _check_aligned(self, address: int) -> None:
        # Counted from the beginning of the range: the driver aligns that to its granularity, not to larger pages.
        if (address - self._start_of(address)) % self.granularity_bytes:
            raise PageError(f"{address:#x}: no multiple of the granularity, {self.granularity_bytes} B, in its range.")

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes < 1 or size_bytes % self.granularity_bytes:
            raise PageError(f"{size_bytes} B: no positive multiple of the granularity, {self.granularity_bytes} B.")


class _Window:
    """Addresses, as torch takes them in. The tensor holds this object, and this object the page allocator."""

    def __init__(self, allocator: CudaPageAllocator, address: int, size_bytes: int) -> None:
        self.allocator = allocator
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|i1",
            "data": (address, False),  # not read-only
            "strides": None,
            "version": 3,
        }


def _page_size(wanted: int | None, granularity: int) -> int:
    if wanted is None:
        return granularity
    if wanted < 1 or wanted % granularity:
        fitting = max(-(-wanted // granularity), 1) * granularity
        raise PageError(f"page_bytes {wanted:,}: no multiple of the granularity, {granularity:,} B. Use {fitting:,}.")
    return wanted


def _sleeping_event() -> Any:
    # Not spinning: a step is long, and its core is wanted elsewhere.
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _note(refused: list[PageError], call: Callable[..., None], *args: Any) -> None:
    try:
        call(*args)
    except PageError as e:
        refused.append(e)
