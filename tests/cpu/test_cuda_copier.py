"""Host memory that a device copies from, on a made-up runtime: who pins, and who lets go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kv_resize import BackingError
from morphserve.residence import CudaCopier

pytestmark = pytest.mark.cpu


class Runtime:
    """Of CUDA, what pins: a range twice is refused, as there."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert flags == 0
        if address in self.pinned or num_bytes > 1 << 20:
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.pinned[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    return found


def test_what_was_pinned_is_let_go(runtime: Runtime) -> None:
    """Guards: a second engine of a process whose memory the system puts where the first one's was, and that cannot be
    pinned a second time; a close that does it twice."""
    copier = CudaCopier("cuda:0")
    memory = [copier.host_memory(num_bytes) for num_bytes in (4096, 10_000)]
    assert runtime.pinned == {tensor.data_ptr(): tensor.numel() for tensor in memory}
    for tensor in memory:
        tensor.fill_(3)
    copier.close()
    assert runtime.pinned == {} and all(int(tensor[-1]) == 3 for tensor in memory)
    copier.close()


def test_what_cannot_be_pinned_is_told_and_not_let_go(runtime: Runtime) -> None:
    """Guards: copies through memory that is not pinned, ten times slower, in silence; an error at the end."""
    copier = CudaCopier("cuda:0")
    with pytest.raises(BackingError, match=r"cannot pin 2,097,152 B .*ulimit -l"):
        copier.host_memory(2 << 20)
    copier.close()


@pytest.mark.parametrize("limit", ["available_bytes", "unmapped_bytes"])
def test_no_more_is_pinned_than_any_limit_leaves(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Guards: host memory for layers that a control group has not, where the kernel then ends the server; or that
    `ulimit -v` has not, told in the words of a library."""
    for name in ("available_bytes", "unmapped_bytes"):
        left = 9000 if name == limit else None
        monkeypatch.setattr(f"morphserve.residence.paged.copier.{name}", lambda left=left: left)
    copier = CudaCopier("cuda:0")
    copier.host_memory(9000)
    with pytest.raises(BackingError, match=r"no host memory for 9,001 B .*9,000 B are available.*morph fewer layers"):
        copier.host_memory(9001)
    assert list(runtime.pinned.values()) == [9000]
