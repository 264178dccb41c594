"""Layers in pages of a device: their host images are copied to addresses that never change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from morphserve.residence.base import BaseLinear
from morphserve.residence.paged.weights import WeightArena
from quant_layers import BASE, HALVES, Build, LayerTensors, LinearImpl, LoadedPart, Part, half_of

_WEIGHT = "weight"


class PagedParts:
    """`Parts` of a weight arena. A linear is built when its part is loaded first, and kept: its addresses stay."""

    directory: Path | None = None
    scratch_bytes = 0  # kernels read the tensors where they lie

    def __init__(
        self, arena: WeightArena, build: Build, device: torch.device, make_room: Callable[[int], None]
    ) -> None:
        """
        Args:
            arena: for all parts.
            build: makes a linear of tensors in the arena.
            device: that norms lie on.
            make_room: adds so many bytes, whole pages, to what the arena takes pages from.
        """
        self._arena = arena
        self._build = build
        self._device = device
        self._make_room = make_room
        self._linears: dict[Part, dict[str, LinearImpl]] = {}
        self._vectors: dict[Part, dict[str, Tensor]] = {}

    def __contains__(self, part: Part) -> bool:
        return part in self._arena

    def keep(self, layer: int, fmt: str, pack: Callable[[], LayerTensors]) -> None:
        """Keep images of both halves on the host; the base comes with `adopt`, when vLLM is done with it."""
        if fmt == BASE:
            return
        packed = pack()
        for half in HALVES:
            part, mine = Part(layer, half, fmt), {n: t for n, t in packed.items() if half_of(n) == half}
            vectors = {n: t[_WEIGHT] for n, t in mine.items() if t.keys() == {_WEIGHT} and t[_WEIGHT].dim() == 1}
            self._vectors[part] = {name: vector.to(self._device) for name, vector in vectors.items()}
            if linears := {name: tensors for name, tensors in mine.items() if name not in vectors}:
                self._arena.add(part, linears)

    def seal(self) -> None:
        return

    def adopt(self, part: Part, bases: Mapping[str, BaseLinear]) -> LoadedPart:
        """Move parameters into the arena, for one half of a layer: never more than that is held twice.

        Raises:
            BackingError: the device has no memory for it.
        """
        self._arena.add(part, {name: base.tensors() for name, base in bases.items()})
        self._make_room(self._arena.num_bytes(part))
        self._arena.load([part])
        self._linears[part] = {
            name: bases[name].build(tensors) for name, tensors in self._arena.tensors(part).items()
        }
        return self._loaded(part)

    def num_bytes(self, part: Part) -> int:
        return self._arena.num_bytes(part) if part in self._arena else 0

    def fetch(self, parts: Sequence[Part]) -> Future[None]:
        """Read nothing: their images lie on the host."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def load(self, parts: Sequence[Part], fetched: None = None) -> dict[Part, LoadedPart]:
        """Map pages and copy.

        Raises:
            BackingError: not enough pages are free.
            KernelError: a kernel refuses.
        """
        self._arena.load(list(parts))
        try:
            return {part: self._loaded(part) for part in parts}
        except BaseException:
            self._arena.unload(list(parts))
            raise

    def unload(self, parts: Sequence[Part]) -> None:
        self._arena.unload(list(parts))

    def _loaded(self, part: Part) -> LoadedPart:
        if part not in self._linears:
            self._linears[part] = {
                name: self._build(part.layer, name, part.format, dict(tensors))
                for name, tensors in self._arena.tensors(part).items()
            }
        return LoadedPart(self._linears[part], self._vectors.get(part, {}), self._arena.num_bytes(part))
