"""ElasticCache on real host memory, on the bookkeeping fake, and on a device arena over the fake page allocator."""

from __future__ import annotations

import ctypes
import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import kv_resize.backing
from kv_resize import (
    ArenaBacking,
    Backing,
    BackingError,
    ElasticCache,
    FakePageAllocator,
    HostBacking,
    KVGeometry,
    KVResizeError,
    MapError,
    PagePool,
)
from kv_resize.host_memory import available_bytes, unmapped_bytes
from morphserve.errors import ConfigError
from morphserve.residence import HostResidence
from tests.fake_backing import FakeBacking
from tests.kv_layouts import block_outermost

PAGE = HostBacking(1).page_bytes
Layout = Callable[[int, int, int, int], KVGeometry]
MakeBacking = Callable[..., Backing]


def host(size_bytes: int, page_bytes: int = PAGE, limit_bytes: int | None = None) -> Backing:
    assert page_bytes == PAGE and limit_bytes is None
    return HostBacking(size_bytes)


def fake(size_bytes: int, page_bytes: int = PAGE, limit_bytes: int | None = None) -> Backing:
    return FakeBacking(size_bytes, page_bytes, limit_bytes)


def arena(size_bytes: int, page_bytes: int = PAGE, limit_bytes: int | None = None) -> Backing:
    num_pages = (-(-size_bytes // page_bytes)) if limit_bytes is None else limit_bytes // page_bytes
    return ArenaBacking(PagePool(FakePageAllocator(num_pages, page_bytes), num_pages), size_bytes)


BACKINGS = pytest.mark.parametrize("make", [host, fake, arena])
LAYOUTS = pytest.mark.parametrize("layout", [KVGeometry.layer_outermost, block_outermost])


def block_bytes(cache: ElasticCache, block: int) -> torch.Tensor:
    """All layers' bytes of one block, int8 [block_bytes]."""
    return torch.cat([cache.buffer[a:b] for a, b in cache.geometry.byte_ranges(block, block + 1)])


def write(cache: ElasticCache, block: int, value: int) -> None:
    for a, b in cache.geometry.byte_ranges(block, block + 1):
        cache.buffer[a:b] = value


def kernel_view(buffer: torch.Tensor) -> dict[str, str]:
    """The buffer's mapping as /proc tells it, independent of mincore."""
    fields: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            start, end = (int(x, 16) for x in head.split("-"))
            inside = start <= buffer.data_ptr() < end
        elif inside:
            fields[head] = rest.strip()
    return fields


def kernel_resident_bytes(cache: ElasticCache) -> int:
    return int(kernel_view(cache.buffer)["Rss:"].split()[0]) * 1024


@LAYOUTS
def test_resident_memory_follows_the_mapped_blocks(layout: Layout) -> None:
    """Guards against memory that unmap does not return, or map takes beyond the blocks."""
    g = layout(30, 24_576, 120, PAGE)  # 88 MB at most
    cache = ElasticCache(HostBacking(g.size_bytes), g, 10)
    for blocks in (10, 100, 30, 120, 1):
        (cache.map if blocks > cache.num_mapped else cache.unmap)(blocks)
        cache.buffer[:24_576].add_(1)
        expected = blocks * cache.block_bytes
        assert cache.num_mapped == blocks
        assert cache.mapped_bytes == pytest.approx(expected, rel=0.02)
        assert cache.resident_bytes() == cache.mapped_bytes
        assert kernel_resident_bytes(cache) == pytest.approx(expected, rel=0.02)


@BACKINGS
@LAYOUTS
@pytest.mark.parametrize("size", [24_576, 5_000, 700])
def test_remapped_blocks_are_zero_and_live_ones_keep_their_bytes(make: MakeBacking, layout: Layout, size: int) -> None:
    """Guards against stale KV in a block whose page straddles a live one, and against losing that one."""
    g = layout(3, size, 40, PAGE)
    cache = ElasticCache(make(g.size_bytes), g, 40)
    for live in (39, 21, 20, 3):
        for b in range(40):
            write(cache, b, b + 1)
        cache.unmap(live)
        cache.map(40)
        for b in range(40):
            assert (block_bytes(cache, b) == (b + 1 if b < live else 0)).all(), (live, b)


@BACKINGS
@LAYOUTS
def test_copy_moves_all_layers(make: MakeBacking, layout: Layout) -> None:
    """Guards against a copy that misses a layer, hits a neighbour or mixes up the direction."""
    g = layout(4, 1000, 32, PAGE)
    cache = ElasticCache(make(g.size_bytes), g, 32)
    for b in range(32):
        write(cache, b, b)
    cache.copy([(31, 2), (20, 7), (21, 3)])
    expected = list(range(32))
    expected[2], expected[7], expected[3] = 31, 20, 21
    assert [int(block_bytes(cache, b).unique()) for b in range(32)] == expected


@BACKINGS
@pytest.mark.parametrize("pairs", [[(5, 3), (6, 3)], [(5, 3), (3, 2)], [(8, 1)], [(3, 8)], [(-1, 2)]])
def test_unsafe_copies_are_refused(make: MakeBacking, pairs: list[tuple[int, int]]) -> None:
    """Guards against copies whose result depends on their order or that touch unmapped memory."""
    g = KVGeometry.layer_outermost(2, 100, 10, PAGE)
    cache = ElasticCache(make(g.size_bytes), g, 8)
    write(cache, 5, 5)
    before = cache.buffer.clone()
    with pytest.raises(KVResizeError, match="copy"):
        cache.copy(pairs)
    assert torch.equal(cache.buffer, before)


@BACKINGS
def test_sizes_out_of_range_are_refused(make: MakeBacking) -> None:
    """Guards against a plan that maps beyond the reservation or unmaps the null block."""
    g = KVGeometry.layer_outermost(2, 100, 10, PAGE)
    cache = ElasticCache(make(g.size_bytes), g, 5)
    for call, blocks in ((cache.map, 11), (cache.map, 4), (cache.unmap, 6), (cache.unmap, 0)):
        with pytest.raises(KVResizeError):
            call(blocks)
        assert cache.num_mapped == 5
    with pytest.raises(KVResizeError, match="Build both"):
        ElasticCache(make(g.size_bytes - 1), g, 5)


@pytest.mark.parametrize("make", [fake, arena])
@LAYOUTS
def test_failed_map_changes_nothing(make: MakeBacking, layout: Layout) -> None:
    """Guards against half a map staying behind: memory, contents and count must be as before."""
    g = layout(4, 10_000, 40, 4096)
    cache = ElasticCache(make(g.size_bytes, 4096, limit_bytes=30 * g.block_bytes), g, 10)
    for b in range(10):
        write(cache, b, b)
    resident = cache.resident_bytes()
    with pytest.raises(MapError, match="cannot map 40 KV blocks") as caught:
        cache.map(40)
    assert 25 <= caught.value.num_possible <= 30
    assert (cache.num_mapped, cache.resident_bytes()) == (10, resident)
    assert [int(block_bytes(cache, b).unique()) for b in range(10)] == list(range(10))
    cache.map(caught.value.num_possible - 1)
    assert not block_bytes(cache, 10).any()


def test_failed_map_on_host_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against ENOMEM in the middle of a map on real memory leaving pages or eating live ones."""
    g = KVGeometry.layer_outermost(4, 10_000, 40, PAGE)
    backing = HostBacking(g.size_bytes)
    cache = ElasticCache(backing, g, 10)
    for b in range(10):
        write(cache, b, b)
    resident = cache.resident_bytes()
    real = backing._advise
    calls = iter(range(100))

    def out_of_memory(advice: int, start: int, end: int) -> int:
        if advice == kv_resize.backing._MADV_POPULATE_WRITE and next(calls) == 2:
            return errno.ENOMEM
        return real(advice, start, end)

    monkeypatch.setattr(backing, "_advise", out_of_memory)
    with pytest.raises(MapError, match="ENOMEM"):
        cache.map(40)
    assert (cache.num_mapped, cache.resident_bytes()) == (10, resident)
    assert [int(block_bytes(cache, b).unique()) for b in range(10)] == list(range(10))


def test_map_beyond_available_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the kernel granting memory it lacks and killing the server afterwards."""
    g = KVGeometry.layer_outermost(2, 4096, 40, PAGE)
    cache = ElasticCache(HostBacking(g.size_bytes), g, 4)
    monkeypatch.setattr(kv_resize.backing, "available_bytes", lambda: 3 * g.block_bytes)
    with pytest.raises(MapError, match="are available"):
        cache.map(8)
    cache.map(7)
    assert cache.num_mapped == 7


@pytest.mark.parametrize("sharers", [1, 2])
def test_what_there_is_memory_for_is_mapped(monkeypatch: pytest.MonkeyPatch, sharers: int) -> None:
    """Guards against a level that gets no block at all where 99 of a hundred would have fitted."""
    g = KVGeometry.layer_outermost(2, 4096, 140, PAGE)
    backing = HostBacking(g.size_bytes)
    cache = ElasticCache(backing, g, 4)
    backing.keep_free_bytes, backing.num_sharers = 3 * g.block_bytes, sharers
    left = sharers * 99 * g.block_bytes + backing.keep_free_bytes + PAGE
    monkeypatch.setattr(kv_resize.backing, "available_bytes", lambda: left)
    assert "are available" in cache.map_at_most(104)
    assert cache.num_mapped == 103 and cache.resident_bytes() == cache.mapped_bytes


def test_a_short_growth_asks_little_of_the_system_and_takes_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a walk over gigabytes of page tables for each guess at how many blocks would fit, between two steps; a
    guess that counts pages which blocks that are mapped have paid for, and is refused as a whole where it is tried."""
    g = KVGeometry.layer_outermost(4, 10_000, 140, PAGE)
    backing = HostBacking(g.size_bytes)
    cache = ElasticCache(backing, g, 4)
    missing = [sum(b - a for a, b in g.populate_ranges(4, n)) - 4 * PAGE for n in range(5, 141)]  # a page of each layer
    asked: list[int] = []
    ask = backing.resident_bytes
    monkeypatch.setattr(backing, "resident_bytes", lambda r: (asked.append(sum(b - a for a, b in r)), ask(r))[1])
    for num_blocks in (90, 60):
        monkeypatch.setattr(kv_resize.backing, "available_bytes", lambda n=num_blocks: missing[n - 5])
        assert "are available" in cache.map_at_most(140)
        assert cache.num_mapped == num_blocks
        assert sum(asked) < 2 * g.size_bytes
        cache.unmap(4)
        asked.clear()


_KEPT = """
import errno, mmap
from kv_resize import BackingError, HostBacking
backing = HostBacking(4 * mmap.PAGESIZE)
backing.populate([(0, backing.page_bytes)])
backing._advise = lambda *_: errno.EINVAL
for refused in (lambda: backing.release([(0, backing.page_bytes)]), lambda: backing.copy_rows(0, 8, [(0, 1 << 40)])):
    try:
        refused()
    except BackingError as e:
        print(e)
"""


def test_checks_of_memory_survive_an_optimized_python() -> None:
    """Guards: under `python -O` a release that released nothing, whose blocks come back with another request's KV, and
    a memmove past the buffer."""
    done = subprocess.run([sys.executable, "-O", "-c", _KEPT], capture_output=True, text=True, check=True)
    kept, outside = done.stdout.splitlines()
    assert "EINVAL" in kept and "mlockall" in kept
    assert f"row {1 << 40}" in outside


def test_pages_that_cannot_be_counted_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: what a vector that nobody has written holds, taken for the resident pages that a growth need not pay."""
    backing = HostBacking(4 * PAGE)

    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EAGAIN)
        return -1

    monkeypatch.setattr(kv_resize.backing, "_libc", SimpleNamespace(mincore=refuse))
    with pytest.raises(BackingError, match=f"mincore of {4 * PAGE:,} B: EAGAIN"):
        backing.resident_bytes([(0, 4 * PAGE)])


def test_kernel_without_populate_keeps_live_bytes() -> None:
    """Guards against the fall-back for old kernels wiping a page it shares with a live block."""
    g = KVGeometry.layer_outermost(3, 1000, 40, PAGE)
    backing = HostBacking(g.size_bytes)
    backing._can_populate = False
    cache = ElasticCache(backing, g, 10)
    for b in range(10):
        write(cache, b, b + 1)
    cache.map(40)
    assert [int(block_bytes(cache, b).unique()) for b in range(40)] == [*range(1, 11), *[0] * 30]
    assert cache.resident_bytes() == cache.mapped_bytes


def test_huge_pages_are_off_unless_asked_for() -> None:
    """Guards against 2 MiB pages that make a run's edge cost far more memory than its blocks."""
    for wanted in (False, True):
        flags = kernel_view(HostBacking(8 * PAGE, huge_pages=wanted).buffer)["VmFlags:"].split()
        assert ("nh" in flags) is not wanted


def test_buffer_outlives_its_owner() -> None:
    """Guards against the mapping going away under tensors that an attention layer still holds."""
    view = HostBacking(10 * PAGE).buffer[3 * PAGE :]
    view.fill_(7)
    assert int(view.sum()) == 7 * 7 * PAGE


@pytest.mark.parametrize("byte_range", [(1, PAGE), (0, PAGE + 1), (0, 99 * PAGE), (PAGE, PAGE), (-PAGE, 0)])
def test_unaligned_ranges_are_refused(byte_range: tuple[int, int]) -> None:
    """Guards against madvise rounding a range into a neighbour."""
    for backing in (host(4 * PAGE), fake(4 * PAGE), arena(4 * PAGE)):
        for call in (backing.populate, backing.release):
            with pytest.raises(BackingError, match="aligned"):
                call([byte_range])


def test_fake_refuses_what_memory_would_allow() -> None:
    """Guards against a fake that lets use-after-release, double map or double release pass."""
    fake = FakeBacking(100, page_bytes=10)
    fake.populate([(0, 50)])
    with pytest.raises(BackingError, match="populated already"):
        fake.populate([(0, 50)])
    fake.release([(20, 50)])
    with pytest.raises(BackingError, match="not populated"):
        fake.release([(20, 30)])
    with pytest.raises(BackingError, match="not populated"):
        fake.copy_rows(0, 10, [(1, 2)])
    with pytest.raises(BackingError, match="not populated"):
        fake.zero([(15, 25)])


def test_available_memory_is_the_tightest_limit(tmp_path: Path) -> None:
    """Guards against reading only the system's free memory inside a container with a lower limit."""
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert available_bytes(tmp_path) == 50 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    for name, limit, used in (("a", "9000", 5000), ("a/b", "max", 100)):
        group = tmp_path / "sys/fs/cgroup" / name
        group.mkdir(parents=True)
        (group / "memory.max").write_text(limit)
        (group / "memory.current").write_text(str(used))
        (group / "memory.stat").write_text("anon 1\ninactive_file 1000\n")
    assert available_bytes(tmp_path) == 5000


class ElasticCacheMachine(RuleBasedStateMachine):
    """Any sequence of map, unmap, copy and write against a list of block contents."""

    layout: Layout = KVGeometry.layer_outermost
    make: MakeBacking = fake

    def __init__(self) -> None:
        super().__init__()
        g = type(self).layout(3, 37, 12, 32)
        limit = g.populate_ranges(0, 9)
        self.cache = ElasticCache(type(self).make(g.size_bytes, 32, sum(b - a for a, b in limit)), g, 2)
        self.content = [0, 0]
        self.next = 1

    @rule(blocks=st.integers(1, 12))
    def resize(self, blocks: int) -> None:
        old = self.cache.num_mapped
        if blocks <= old:
            self.cache.unmap(blocks)
            del self.content[blocks:]
            return
        try:
            self.cache.map(blocks)
        except MapError:
            assert blocks > 9
        else:
            self.content += [0] * (blocks - old)

    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        ids = data.draw(st.permutations(range(self.cache.num_mapped)))
        half = data.draw(st.integers(0, len(ids) // 2))
        pairs = list(zip(ids[:half], ids[half : 2 * half], strict=True))
        self.cache.copy(pairs)
        for src, dst in pairs:
            self.content[dst] = self.content[src]

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.cache.num_mapped - 1))
        self.content[block] = self.next = self.next % 80 + 1
        write(self.cache, block, self.next)

    @invariant()
    def contents_hold(self) -> None:
        """Guards against any sequence that loses, leaks or fails to zero a block."""
        actual = [block_bytes(self.cache, b).unique().tolist() for b in range(self.cache.num_mapped)]
        assert actual == [[c] for c in self.content]


class BlockOutermostMachine(ElasticCacheMachine):
    """The same with all layers of a block side by side."""

    layout = block_outermost


class ArenaMachine(ElasticCacheMachine):
    """The same on device pages."""

    make = arena


TestLayerOutermost = ElasticCacheMachine.TestCase
TestBlockOutermost = BlockOutermostMachine.TestCase
TestArena = ArenaMachine.TestCase
TestLayerOutermost.settings = TestBlockOutermost.settings = TestArena.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)


def test_a_limit_that_only_throttles_counts(tmp_path: Path) -> None:
    """Guards against growth beyond `memory.high`, where the kernel slows a process until nothing is served."""
    group = tmp_path / "sys/fs/cgroup/a"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a\n")
    for name, text in (("max", "9000"), ("high", "8000"), ("current", "5000"), ("stat", "anon 1\n")):
        (group / f"memory.{name}").write_text(text)
    assert available_bytes(tmp_path) == 3000
    (group / "memory.high").write_text("max")
    assert available_bytes(tmp_path) == 4000


@pytest.mark.parametrize("sees_itself_as_top", [False, True])
def test_limits_of_the_first_version_of_control_groups_count(tmp_path: Path, sees_itself_as_top: bool) -> None:
    """Guards against reading the machine's memory in a container of an older host, which then kills the server."""
    top = tmp_path / "sys/fs/cgroup/memory"
    group = top if sees_itself_as_top else top / "docker/1"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:   50 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,cpuacct:/docker/1\n4:hugetlb,memory:/docker/1\n0::/\n")
    stat = "inactive_file 1\ntotal_inactive_file 700\n"
    for name, text in (("limit_in_bytes", "9000"), ("usage_in_bytes", "5000"), ("stat", stat)):
        (group / f"memory.{name}").write_text(text)
    assert available_bytes(tmp_path) == 4700


@pytest.mark.parametrize(("key", "limit"), [("VmSize", "RLIMIT_AS"), ("VmData", "RLIMIT_DATA")])
def test_limits_of_the_process_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, limit: str) -> None:
    """Guards against a start under ulimit whose first long prefill has no address space left."""
    limits = {getattr(resource, limit): (900 * 1024, resource.RLIM_INFINITY)}
    unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, unlimited))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(f"Name:\tx\nVmPeak:\t990 kB\n{key}:\t   600 kB\n")
    assert unmapped_bytes(tmp_path) == 300 * 1024
    limits.clear()
    assert unmapped_bytes(tmp_path) is None
    limits[getattr(resource, limit)] = 1024, 1024
    assert unmapped_bytes(tmp_path) == 0


def test_a_worst_case_pass_must_fit_the_limits_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against finding out at the first long prefill."""
    residence = HostResidence()
    residence.open_cache(KVGeometry.layer_outermost(2, 4096, 40, PAGE), 4)
    monkeypatch.setattr("morphserve.residence.host.unmapped_bytes", lambda: 1000)
    residence.keep_free(2000, 2)
    with pytest.raises(ConfigError, match="takes up to 1,001 B, .*leave 1,000 B.*kv.max_num_blocks"):
        residence.keep_free(2002, 2)
