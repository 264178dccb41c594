"""Blocks are mapped only beside what a worst-case forward pass needs."""

from __future__ import annotations

import mmap

import pytest

from kv_resize import HostBacking, backing
from kv_resize.errors import BackingError


@pytest.mark.parametrize(("sharers", "available", "fits"), [(1, 7, True), (1, 6, False), (2, 11, True), (2, 10, False)])
def test_what_is_kept_free_stays_free(
    monkeypatch: pytest.MonkeyPatch, sharers: int, available: int, fits: bool
) -> None:
    """Guards: growth into the memory of the next long prefill, or of another rank that grows at the same time."""
    page = mmap.PAGESIZE
    monkeypatch.setattr(backing, "available_bytes", lambda: available * page)
    host = HostBacking(8 * page)
    host.keep_free_bytes, host.num_sharers = 3 * page, sharers
    if fits:
        host.populate([(0, 4 * page)])
        return
    with pytest.raises(BackingError, match="kept free for a worst-case forward pass"):
        host.populate([(0, 4 * page)])
    assert host.resident_bytes([(0, 4 * page)]) == 0
