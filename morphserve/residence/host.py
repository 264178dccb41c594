"""Layers and KV blocks in host memory: a layer that is not served lies in a file, and blocks in pages of the system."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from traceback import clear_frames
from typing import Any, ClassVar

import torch
from torch import Tensor

from kv_resize import ElasticCache, HostBacking, KVGeometry
from morphserve.residence.base import BaseLinear, PartsKey
from morphserve.residence.host_memory import FREED_WEIGHTS_RETURN, resident_bytes, weights_on_their_own_pages
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
        if not self.store.has(layer, fmt):
            self.store.write(layer, fmt, pack(), self._key.layouts.get(fmt, ""))
            self._num_packed += 1

    def seal(self) -> None:
        if self._num_packed:
            logger.info("morphserve: packed %d layer variants into %s", self._num_packed, self.directory)
        self.store.verify()

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

    def load(self, parts: Sequence[Part]) -> dict[Part, LoadedPart]:
        """Read and build parts beside those that serve.

        Raises:
            StoreError: a file is missing, damaged, or packed for another kernel.
            KernelError: a kernel refuses.
        """
        loaded: dict[Part, LoadedPart] = {}
        try:
            with weights_on_their_own_pages():
                for (layer, fmt), halves in groupby(parts, key=lambda part: (part.layer, part.format)):
                    self._load(layer, fmt, list(halves), loaded)
        except BaseException:
            loaded.clear()
            self.unload(parts)
            raise
        return loaded

    def _load(self, layer: int, fmt: str, parts: Sequence[Part], loaded: dict[Part, LoadedPart]) -> None:
        """Read the file of a layer in a format once, and build those halves of it."""
        row = self.store.entry(layer, fmt)
        if fmt != BASE and row.kernel.partition(SOURCE_MARK)[0] != self._key.kernels[fmt].name:
            here = self._key.kernels[fmt].name
            raise self._useless(f"layer {layer} {fmt!r} is packed for kernel {row.kernel!r}, here runs {here!r}")
        halves = {part.half for part in parts}
        tensors = self.store.read(layer, fmt, lambda name: half_of(name) in halves)
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
    def open(cls, device: torch.device, forward_stream: Callable[[], object]) -> HostResidence:
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

    def reserve(self, sizes: Mapping[str, Sequence[int]], least: int, most: int) -> int | None:
        return None

    def open_cache(self, geometry: KVGeometry, num_blocks: int) -> ElasticCache:
        """Return a cache with no block mapped: vLLM's warm-up may write anywhere in it, see `RankKV.map`."""
        self._backing = HostBacking(geometry.size_bytes)
        return ElasticCache(self._backing, geometry, num_blocks=0)

    def keep_free(self, num_bytes: int, num_ranks: int) -> None:
        assert self._backing is not None
        self._backing.keep_free_bytes, self._backing.num_sharers = num_bytes, num_ranks

    def wait(self) -> None:
        return

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
