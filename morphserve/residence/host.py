"""Layers and KV blocks in host memory: a layer that is not served lies in a file, and blocks in pages of the system."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from traceback import clear_frames
from typing import Any, ClassVar

import torch
from torch import Tensor

from kv_resize import ElasticCache, HostBacking, KVGeometry, unmapped_bytes
from morphserve.errors import ConfigError
from morphserve.residence.base import BaseLinear, PartsKey, RankSizes
from morphserve.residence.host_memory import FREED_WEIGHTS_RETURN, resident_bytes, weights_on_their_own_pages
from morphserve.residence.reader import Reader
from quant_layers import (
    BASE,
    SOURCE_MARK,
    STORE_SCHEMA,
    Build,
    Half,
    LayerTensors,
    LoadedPart,
    Part,
    StoreError,
    VariantStore,
    half_of,
    trim,
)

logger = logging.getLogger("vllm.morphserve")

Fetched = dict[tuple[int, str], dict[str, dict[str, Tensor]]]  # layer, format |-> what its file holds


class AtOnce(Executor):
    """Runs what it is given within `submit`, on the caller's thread: host memory comes and goes in microseconds."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return a future that is done."""
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except BaseException as e:
            clear_frames(e.__traceback__)  # who asks for the result later must not hold half a layer's tensors
            done.set_exception(e)
        return done


class StoredParts:
    """Layers in files, built when they are loaded.

    The tensors that a layer was loaded with are stored like its variants, and level 0 is rebuilt from the same bytes.
    """

    def __init__(self, store: VariantStore, key: PartsKey, build: Build) -> None:
        """
        Args:
            store: holds, or will hold, what is asked for.
            key: names kernels and layouts.
            build: makes a linear of its tensors.
        """
        self.store = store
        self.directory: Path | None = store.directory
        self._key = key
        self._build = build
        self._reader = Reader()
        self._packs: dict[tuple[int, str], Callable[[], LayerTensors]] = {}  # until sealed
        self._num_packed = 0
        self._linears: dict[tuple[int, Half], tuple[str, ...]] = {}  # of adopted parts: names
        self._base_bytes: dict[tuple[int, Half], int] = {}
        self._bias_bytes: dict[tuple[int, Half], int] = {}  # of the copies that a variant makes, in fp32 at most
        self._largest_bytes = 0

    @property
    def scratch_bytes(self) -> int:
        return self._largest_bytes

    def __contains__(self, part: Part) -> bool:
        return part.format == BASE or part.format in self._key.kernels

    def keep(self, layer: int, fmt: str, pack: Callable[[], LayerTensors]) -> None:
        self._packs[layer, fmt] = pack
        if not self.store.has(layer, fmt):
            self._write(layer, fmt)

    def _write(self, layer: int, fmt: str) -> None:
        self.store.write(layer, fmt, self._packs[layer, fmt](), self._key.layouts.get(fmt, ""))
        self._num_packed += 1

    def seal(self) -> None:
        """Check what is kept, and the base against the tensors that are loaded; make once more what is damaged."""
        keys = list(self._packs)
        if damaged := self._damaged(keys):
            for key in damaged:
                self._write(*key)
            self._damaged(damaged, again=True)
        if self._num_packed:
            logger.info("morphserve: packed %d layer variants into %s", self._num_packed, self.directory)
        self._packs.clear()

    def _damaged(self, keys: Sequence[tuple[int, str]], again: bool = False) -> list[tuple[int, str]]:
        """Return the layers whose files do not hold what they should, with one warning; raise if it is so `again`."""
        faults = self.store.faults([self.store.entry(*key) for key in keys])
        errors = {(row.layer, row.format): error for row, error in faults}
        for layer, fmt in keys:
            if fmt != BASE or (layer, fmt) in errors:
                continue
            if others := self.store.differing(layer, fmt, self._packs[layer, fmt]()):
                errors[layer, fmt] = self._useless(f"layer {layer} {fmt!r}: {others[0]} is not what was loaded")
        if not errors:
            return []
        first = next(iter(errors.values()))
        if again:
            raise first
        what, _, _ = str(first).partition("; delete ")
        logger.warning("morphserve: files of %d layers are made again, the first because %s", len(errors), what)
        return list(errors)

    def adopt(self, part: Part, bases: Mapping[str, BaseLinear]) -> LoadedPart:
        linears = {name: base.take() for name, base in bases.items()}
        sizes = [linear.nbytes for linear in linears.values()]
        biases = [base.bias for base in bases.values() if base.bias is not None]
        where = part.layer, part.half
        self._linears[where] = tuple(linears)
        self._base_bytes[where] = sum(sizes)
        self._bias_bytes[where] = sum(bias.numel() * torch.float32.itemsize for bias in biases)
        self._largest_bytes = max(self._largest_bytes, *sizes)
        return LoadedPart(linears, {}, sum(sizes))

    def num_bytes(self, part: Part) -> int:
        """Return what a part takes beyond the biases that the model keeps at every level."""
        where = part.layer, part.half
        if part.format == BASE or where not in self._linears:
            return self._base_bytes.get(where, 0)
        sizes = self.store.entry(part.layer, part.format).sizes
        return self._bias_bytes[where] + sum(sizes[name] for name in self._linears[where])

    def fetch(self, parts: Sequence[Part]) -> Future[Fetched]:
        return self._reader.submit(self._read, list(parts))

    def _read(self, parts: Sequence[Part]) -> Fetched:
        """Read the file of each layer in a format once.

        Raises:
            StoreError: one is missing, damaged, or packed for another kernel.
        """
        fetched: Fetched = {}
        for (layer, fmt), mine in groupby(parts, key=lambda part: (part.layer, part.format)):
            packed_for, kernel = self.store.entry(layer, fmt).kernel, self._key.kernels.get(fmt)
            if kernel is not None and packed_for.partition(SOURCE_MARK)[0] != kernel.name:
                what = f"layer {layer} {fmt!r} is packed for kernel {packed_for!r}"
                raise self._useless(f"{what}, here runs {kernel.name!r}")
            halves = {part.half for part in mine}
            fetched[layer, fmt] = self.store.read(layer, fmt, lambda name, halves=halves: half_of(name) in halves)
        return fetched

    def load(self, parts: Sequence[Part], fetched: Fetched | None = None) -> dict[Part, LoadedPart]:
        """Build parts beside those that serve, of what was fetched or is read now.

        Raises:
            StoreError: a file is missing, damaged, or packed for another kernel.
            KernelError: a kernel refuses.
        """
        loaded: dict[Part, LoadedPart] = {}
        try:
            with weights_on_their_own_pages():
                fetched = self._read(parts) if fetched is None else fetched
                for (layer, fmt), halves in groupby(parts, key=lambda part: (part.layer, part.format)):
                    self._load(layer, fmt, list(halves), fetched.pop((layer, fmt)), loaded)
        except BaseException:
            loaded.clear()
            if fetched is not None:
                fetched.clear()  # who waits for the read may hold on to it
            self.unload(parts)
            raise
        return loaded

    def _load(
        self,
        layer: int,
        fmt: str,
        parts: Sequence[Part],
        tensors: dict[str, dict[str, Tensor]],
        loaded: dict[Part, LoadedPart],
    ) -> None:
        """Build halves of a layer in a format."""
        for part in parts:
            names = self._linears[layer, part.half]
            found = {name for name in tensors if half_of(name) == part.half}
            others = found.difference(names)
            if not found.issuperset(names) or not all(_is_vector(tensors[name]) for name in others):
                found_linears, expected = sorted(found), sorted(names)
                raise self._useless(f"layer {layer} {fmt!r} holds linears {found_linears}, the model has {expected}")
            vectors = {name: tensors.pop(name)["weight"] for name in others}
            # Popped, so that a kernel which copies leaves no second copy behind.
            linears = {name: self._build(layer, name, fmt, tensors.pop(name)) for name in names}
            loaded[part] = LoadedPart(linears, vectors, sum(linear.nbytes for linear in linears.values()))

    def _useless(self, what: str) -> StoreError:
        return StoreError(f"{what}; delete {self.directory}, and the next start builds it again")

    def unload(self, parts: Sequence[Part]) -> None:
        """Return the memory of linears that were dropped; malloc_trim takes 5 to 46 ms, so only where it must be."""
        if not FREED_WEIGHTS_RETURN:
            trim()


def _is_vector(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether these are a norm's: its weight alone, [N]."""
    return tensors.keys() == {"weight"} and tensors["weight"].dim() == 1


class HostResidence:
    """Where a rank on a CPU has its bytes. `Residence`."""

    in_pages: ClassVar[bool] = False
    device_type = "cpu"
    page_bytes: int | None = None

    def __init__(self) -> None:
        self.background: Executor = AtOnce()
        self._backing: HostBacking | None = None

    @classmethod
    def open(cls, device: torch.device, forward_stream: Callable[[], object], sizes: RankSizes) -> HostResidence:
        return cls()

    def open_parts(self, key: PartsKey, build: Build) -> StoredParts:
        mark = key.fingerprint()
        directory = key.cache_dir / "variants" / f"{mark[:24]}-{STORE_SCHEMA}"
        return StoredParts(VariantStore.open(directory, mark, key.layouts), key, build)

    def loading(self) -> AbstractContextManager[None]:
        return weights_on_their_own_pages()

    def loaded(self, model: torch.nn.Module) -> None:
        """Move the loaded tensors out of the heap, one at a time.

        vLLM packs module by module and drops each tensor as it goes: its hole in the heap would take the next packed
        linear, whose memory would then stay resident when it is swapped out.
        """
        if not FREED_WEIGHTS_RETURN:
            return
        storages = Counter(parameter.untyped_storage().data_ptr() for parameter in model.parameters())
        for parameter in model.parameters():
            if storages[parameter.untyped_storage().data_ptr()] == 1:  # views of one tensor must stay views
                with weights_on_their_own_pages():
                    parameter.data = parameter.data.clone()
        trim()

    def reserve(
        self, sizes: Mapping[str, Sequence[int]], least: int, most: int, memory_share: float, kv_bytes: int | None
    ) -> int | None:
        return None

    def open_cache(self, geometry: KVGeometry, num_blocks: int) -> ElasticCache:
        """Return a cache with no block mapped: vLLM's warm-up may write anywhere in it, see `RankKV.map`."""
        self._backing = HostBacking(geometry.size_bytes)
        return ElasticCache(self._backing, geometry, num_blocks=0)

    def extend_cache(self, cache: ElasticCache, num_blocks: int) -> None:
        cache.map(num_blocks)

    def keep_free(self, num_bytes: int, num_ranks: int) -> None:
        """Keep so much free.

        Raises:
            ConfigError: a limit of the process will not let it take that: the first long prefill would end it.
        """
        assert self._backing is not None
        own, left = num_bytes // num_ranks, unmapped_bytes()
        if left is not None and own > left:
            raise ConfigError(
                f"a worst-case forward pass takes up to {own:,} B, and the limits of this process (ulimit -v, ulimit "
                f"-d) leave {left:,} B: the address range of the KV cache counts whole. Raise them, or lower "
                "kv.max_num_blocks."
            )
        self._backing.keep_free_bytes, self._backing.num_sharers = num_bytes, num_ranks

    def wait(self) -> None:
        return

    def fence(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        return

    def trim(self) -> None:
        """Return free heap pages to the system; takes milliseconds."""
        trim()

    def figures(self) -> dict[str, int]:
        """Return resident memory of this process: anonymous, file-backed and shared."""
        return resident_bytes()

    def close(self) -> None:
        return
