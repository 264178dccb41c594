"""A CUDA driver without a device: what `CudaPageAllocator` uses of `cuda.bindings.driver`, over host memory.

Functions answer as those of cuda-bindings 13 do: a tuple of the result and, where there is one, a value, None after a
failure. The rules are those of the CUDA driver API's pages on virtual memory management and contexts.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cpu.cuda_stub_types import (
    CUmemAccess_flags,
    CUmemAccessDesc,
    CUmemAllocationGranularity_flags,
    CUmemAllocationProp,
    CUmemAllocationType,
    CUmemLocation,
    CUmemLocationType,
    CUresult,
    Opaque,
)

from kv_resize import CudaPageAllocator


class Refused(Exception):
    def __init__(self, code: CUresult) -> None:
        self.code = code


class Memory:
    """What a handle stands for."""

    def __init__(self, size_bytes: int, poison: int) -> None:
        self.bytes = torch.full((size_bytes,), poison, dtype=torch.int8)
        self.is_released = False
        self.is_mapped = False


class FakeStream:
    """Work is a count. None of it is done before somebody waits for it."""

    def __init__(self) -> None:
        self.num_queued = self.num_done = 0


class FakeEvent:
    def __init__(self, driver: StubDriver) -> None:
        self._driver = driver

    def record(self, stream: FakeStream) -> None:
        self._driver.count_event("record")
        self._stream, self._target = stream, stream.num_queued

    def synchronize(self) -> None:
        self._driver.count_event("synchronize")
        self._stream.num_done = max(self._stream.num_done, self._target)
        self._driver.while_waiting()


def entry(num_values: int = 0, needs_context: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the driver: counted, may be planned to fail, refused in a thread without a context."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: StubDriver, *args: Any) -> tuple[Any, ...]:
            try:
                if self.count(method.__name__):
                    raise Refused(self.fail_code)
                if needs_context and not (self.num_retained and getattr(self._thread, "context", None)):
                    raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
                value = method(self, *args)
            except Refused as e:
                return (e.code, *[None] * num_values)
            return (CUresult.CUDA_SUCCESS, value) if num_values else (CUresult.CUDA_SUCCESS,)

        return call

    return wrap


def check(holds: object, code: CUresult = CUresult.CUDA_ERROR_INVALID_VALUE) -> None:
    if not holds:
        raise Refused(code)


class StubDriver:
    """One device. A page's bytes travel with it; without access, addresses show poison and take no writes."""

    CUresult = CUresult
    CUmemAllocationType = CUmemAllocationType
    CUmemLocationType = CUmemLocationType
    CUmemAccess_flags = CUmemAccess_flags
    CUmemAllocationGranularity_flags = CUmemAllocationGranularity_flags
    CUmemAllocationProp = CUmemAllocationProp
    CUmemAccessDesc = CUmemAccessDesc

    POISON = 0x55

    def __init__(self, memory_bytes: int, granularity_bytes: int = 64) -> None:
        self.memory_bytes = memory_bytes
        self.granularity_bytes = granularity_bytes
        self.calls: list[str] = []
        self.fail_at: int | None = None  # the call that fails, counted from 0, events included
        self.fail_code = CUresult.CUDA_ERROR_UNKNOWN
        self.streams: list[FakeStream] = []  # whose work may touch what is accessible when it is queued
        self.while_waiting: Callable[[], None] = lambda: None  # happens during each wait for an event
        self.is_initialized = False
        self.num_retained = 0
        self.reserved: dict[int, int] = {}  # address -> size
        self.memories: dict[int, Memory] = {}  # handle -> memory
        self.mapped: dict[int, int] = {}  # address -> handle
        self.accessible: dict[int, list[int]] = {}  # address -> work that each stream had been given before
        self.withdrawn: dict[int, list[int]] = {}  # address -> the same, of the last work that may touch it
        self._windows: dict[int, torch.Tensor] = {}
        self._next_address, self._next_handle = granularity_bytes * 1000, 7000
        self._thread = threading.local()

    @entry(needs_context=False)
    def cuInit(self, Flags: int) -> None:
        check(Flags == 0)
        self.is_initialized = True

    @entry(1, needs_context=False)
    def cuDeviceGet(self, ordinal: int) -> Opaque:
        check(self.is_initialized, CUresult.CUDA_ERROR_NOT_INITIALIZED)
        check(ordinal == 0, CUresult.CUDA_ERROR_INVALID_DEVICE)
        return Opaque(ordinal)

    @entry(1, needs_context=False)
    def cuDevicePrimaryCtxRetain(self, dev: Opaque) -> str:
        check(int(dev) == 0, CUresult.CUDA_ERROR_INVALID_DEVICE)
        self.num_retained += 1
        return "primary context"

    @entry(needs_context=False)
    def cuDevicePrimaryCtxRelease(self, dev: Opaque) -> None:
        check(int(dev) == 0, CUresult.CUDA_ERROR_INVALID_DEVICE)
        check(self.num_retained, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.num_retained -= 1

    @entry(needs_context=False)
    def cuCtxSetCurrent(self, ctx: str | None) -> None:
        check(ctx == "primary context" and self.num_retained, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self._thread.context = ctx

    @entry(1)
    def cuMemGetAllocationGranularity(self, prop: Any, option: int) -> int:
        self._check_location(prop.location)
        check(prop.type == CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED)
        check(option == CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM)
        return self.granularity_bytes

    @entry(1)
    def cuMemAddressReserve(self, size: int, alignment: int, addr: int, flags: int) -> Opaque:
        self._check_size(size)
        check(alignment & (alignment - 1) == 0 and flags == 0 and addr == 0)
        step = max(alignment, self.granularity_bytes)
        address = -(-self._next_address // step) * step
        self._next_address = address + size + self.granularity_bytes  # so that no two ranges meet
        self.reserved[address] = size
        self._windows[address] = torch.full((size,), self.POISON, dtype=torch.int8)
        return Opaque(address)

    @entry()
    def cuMemAddressFree(self, ptr: int, size: int) -> None:
        check(self.reserved.get(int(ptr)) == size)
        check(not any(int(ptr) <= a < int(ptr) + size for a in self.mapped))
        del self.reserved[int(ptr)], self._windows[int(ptr)]

    @entry(1)
    def cuMemCreate(self, size: int, prop: Any, flags: int) -> Opaque:
        self._check_size(size)
        self._check_location(prop.location)
        check(prop.type == CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED and flags == 0)
        check(self.used_bytes + size <= self.memory_bytes, CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        self._next_handle += 16
        self.memories[self._next_handle] = Memory(size, self.POISON)
        return Opaque(self._next_handle)

    @entry()
    def cuMemRelease(self, handle: Opaque) -> None:
        memory = self._memory(handle)
        memory.is_released = True
        self._forget(int(handle))

    @entry()
    def cuMemMap(self, ptr: int, size: int, offset: int, handle: Opaque, flags: int) -> None:
        memory = self._memory(handle)
        self._check_size(size)
        check(int(ptr) % self.granularity_bytes == 0 and flags == 0)
        check(offset == 0 and size <= memory.bytes.numel())
        check(any(start <= int(ptr) and int(ptr) + size <= start + n for start, n in self.reserved.items()))
        check(not any(a < int(ptr) + size and int(ptr) < a + self._size_at(a) for a in self.mapped))
        # The driver takes several mappings of one memory, and mappings of a part; here the bytes could not follow.
        assert not memory.is_mapped and size == memory.bytes.numel(), "one memory, one mapping"
        memory.is_mapped = True
        self.mapped[int(ptr)] = int(handle)

    @entry()
    def cuMemSetAccess(self, ptr: int, size: int, desc: list[Any], count: int) -> None:
        self._check_size(size)
        check(count == len(desc) == 1)
        self._check_location(desc[0].location)
        check(desc[0].flags == CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        found, position = [], int(ptr)
        while position < int(ptr) + size:
            check(position in self.mapped)
            found.append(position)
            position += self._size_at(position)
        check(position == int(ptr) + size)
        for address in found:
            self.withdrawn.pop(address, None)
            if address not in self.accessible:
                self._window(address).copy_(self.memories[self.mapped[address]].bytes)
                self.accessible[address] = [stream.num_queued for stream in self.streams]

    @entry()
    def cuMemUnmap(self, ptr: int, size: int) -> None:
        address = int(ptr)
        check(address in self.mapped and self._size_at(address) == size)
        memory = self.memories[self.mapped[address]]
        if address in self.accessible:
            last = self.withdrawn.pop(address, [stream.num_queued for stream in self.streams])
            for stream, before, end in zip(self.streams, self.accessible.pop(address), last, strict=True):
                assert stream.num_done >= end or end == before, "unmapped under queued work"
            memory.bytes.copy_(self._window(address))
        self._window(address).fill_(self.POISON)
        memory.is_mapped = False
        self._forget(self.mapped.pop(address))

    def withdraw(self, address: int, size: int) -> None:
        """Say that work which is queued from now on does not touch these addresses; else all of it touches all."""
        for mapped in [a for a in self.accessible if address <= a < address + size]:
            self.withdrawn.setdefault(mapped, [stream.num_queued for stream in self.streams])

    def publish(self, address: int, size: int) -> None:
        """Say that work which is queued from now on touches these addresses again."""
        for mapped in [a for a in self.withdrawn if address <= a < address + size]:
            del self.withdrawn[mapped]

    def state(self) -> tuple[object, ...]:
        """All that a call may change, to compare."""
        memories = {h: (bytes(m.bytes.numpy()), m.is_released, m.is_mapped) for h, m in self.memories.items()}
        windows = {address: bytes(window.numpy()) for address, window in self._windows.items()}
        return self.num_retained, dict(self.reserved), memories, dict(self.mapped), set(self.accessible), windows

    @property
    def used_bytes(self) -> int:
        return sum(memory.bytes.numel() for memory in self.memories.values())

    def view(self, address: int, size_bytes: int) -> torch.Tensor:
        """Host memory that stands for a reserved range."""
        for start, window in self._windows.items():
            if start <= address and address + size_bytes <= start + window.numel():
                return window[address - start : address - start + size_bytes]
        raise AssertionError(f"view of {address:#x}, which is not reserved")

    def allocator(self, streams: Sequence[FakeStream] = (), **options: Any) -> CudaPageAllocator:
        """A page allocator on this driver, which waits for `streams`, one of its own when there are none."""
        self.streams = list(streams) or [FakeStream()]
        return CudaPageAllocator(0, self.streams, driver=self, view=self.view, make_event=self.make_event, **options)

    def make_event(self) -> FakeEvent:
        return FakeEvent(self)

    def count(self, name: str) -> bool:
        """Note a call; whether it is the one that fails."""
        self.calls.append(name)
        return len(self.calls) - 1 == self.fail_at

    def count_event(self, name: str) -> None:
        if self.count(name):
            raise RuntimeError(f"{name} failed, as planned")

    def _memory(self, handle: Opaque) -> Memory:
        memory = self.memories.get(int(handle))
        if memory is None or memory.is_released:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        return memory

    def _forget(self, handle: int) -> None:
        memory = self.memories[handle]
        if memory.is_released and not memory.is_mapped:
            del self.memories[handle]

    def _size_at(self, address: int) -> int:
        return self.memories[self.mapped[address]].bytes.numel()

    def _window(self, address: int) -> torch.Tensor:
        return self.view(address, self._size_at(address))

    def _check_size(self, size: int) -> None:
        check(size > 0 and size % self.granularity_bytes == 0)

    def _check_location(self, location: CUmemLocation) -> None:
        check(location.type == CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
        check(location.id == 0, CUresult.CUDA_ERROR_INVALID_DEVICE)
