"""Copies from host to device that no forward pass waits for."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from kv_resize import BackingError, available_bytes, unmapped_bytes


class Copier(Protocol):
    """One user at a time, from any thread."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Return int8 [num_bytes] that copies are fastest from."""
        ...

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Begin to copy int8 tensors of one length."""
        ...

    def finish(self) -> None:
        """Wait until every copy begun has arrived, and all else that the background thread has queued on the device.

        Work that is queued from now on sees it, on whatever stream.
        """
        ...

    def close(self) -> None:
        """Let go of the host memory that was given; copies from it are slow from then on."""
        ...


class HostCopier:
    """Stands in for a device's copy engine where there is none: copies at once."""

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.int8)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        destination.copy_(source)

    def finish(self) -> None:
        return

    def close(self) -> None:
        return


class CudaCopier:
    """Pinned memory, and a stream that is also the background thread's own.

    In pieces, so that what else copies on this device (KV transfers, sampled tokens) gets its turn in between.
    """

    def __init__(self, device: Any, chunk_bytes: int = 16 << 20) -> None:
        """
        Args:
            device: of torch.
            chunk_bytes: of one copy; 16 MiB take 0.3 ms at PCIe 5's 55 GB/s.
        """
        self._chunk_bytes = chunk_bytes
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # no stream's priority is lower than the default's
        self._pinned: list[Tensor] = []

    @property
    def stream(self) -> Any:
        """For who must not unmap under a copy."""
        return self._stream

    def host_memory(self, num_bytes: int) -> Tensor:
        # Not torch's pinned memory: it rounds up to a power of two, half as much again for a Llama's layers.
        known = [left for left in (available_bytes(), unmapped_bytes()) if left is not None]
        if known and num_bytes > (available := min(known)):
            raise BackingError(
                f"no host memory for {num_bytes:,} B of layers: {available:,} B are available. Every format of a layer "
                "that is morphed lies there: give the server more, or morph fewer layers (ladder.steps)."
            )
        private = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Pinning faults page by page: fewer are quicker. A child that vLLM forks must not copy what is pinned.
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            with suppress(OSError):  # of a kernel without huge pages
                private.madvise(advice)
        memory = torch.frombuffer(private, dtype=torch.int8)
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)
        if int(error) != 0:
            raise BackingError(
                f"cannot pin {num_bytes:,} B of host memory for layers (cudaHostRegister: {error}). Give the server "
                "more host memory, raise the limit of locked memory (ulimit -l), or morph fewer layers (ladder.steps)."
            )
        self._pinned.append(memory)
        return memory

    def copy(self, destination: Tensor, source: Tensor) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for start in range(0, source.numel(), self._chunk_bytes):
                end = start + self._chunk_bytes
                destination[start:end].copy_(source[start:end], non_blocking=True)

    def finish(self) -> None:
        # Once the host has seen the stream empty, whatever it launches later, on any stream, comes after.
        self._stream.synchronize()

    def close(self) -> None:
        """Unpin. What the system maps at the same addresses next could not be pinned otherwise."""
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr())
