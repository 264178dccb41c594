"""Packed layers on disk: one file per layer and format, and a manifest that says what they are.

Nothing is overwritten: a file's name carries its hash, and the manifest, replaced in one rename, says
which files count. A crash therefore leaves either the old or the new state, and at worst an orphan, which
the next writer removes. One store belongs to one rank: tensor-parallel slices differ. Machines that run
different kernels may share a directory: the kernel is part of a layer's key.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from quant_layers.errors import StoreError
from quant_layers.private import locked, private_directory
from quant_layers.store.heldfiles import HeldFiles
from quant_layers.store.tensorfile import (
    Digests,
    LayerTensors,
    flatten,
    hashes_of,
    read_file,
    tensor_digest,
    write_file,
)

SCHEMA = 2  # 1 did not say how large each linear is
_MANIFEST = "manifest.json"
_LOCK = ".lock"
_SUFFIX = ".safetensors"
_PARTIAL = ".partial"
_SLACK_BYTES = 1 << 20  # headers, manifest and file-system blocks

Key = tuple[int, str, str]  # layer, format, kernel
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One row of the manifest."""

    layer: int  # decoder layer id
    format: str
    kernel: str  # that the packed layout is for; empty for the base
    file: str
    sha256: str
    size: int  # bytes of the file
    nbytes: int  # bytes of its tensors
    shapes: dict[str, list[int]]  # "linear/tensor" -> shape
    sizes: dict[str, int]  # linear -> bytes of its tensors


class VariantStore:
    """The layers of one model on one rank, in every format they were packed in.

    A format is seen as the kernel named at `open` packed it; what other kernels packed stays on disk, unseen.

    1. What `read` returns is what `write` was given, or StoreError.
    2. A crash or a second writer, at any point, never makes a file that `has` reports unreadable.
    3. Tensors come back in anonymous memory of their own: dropping them frees what they occupied.
    4. From `verify` on, `read` gives what was verified, also after the directory has been deleted, or raises where it
       was changed.
    """

    def __init__(self, directory: Path, fingerprint: str, kernels: Mapping[str, str]) -> None:
        """Read nothing yet: callers use `open`."""
        self.directory = directory
        self.fingerprint = fingerprint
        self._kernels = dict(kernels)
        self._rows: MappingProxyType[Key, StoredLayer] = MappingProxyType({})
        self._files = HeldFiles(directory, self._remedy)
        self._digests: dict[str, Digests] = {}  # by file, of those that were verified

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        fingerprint: str,
        kernels: Mapping[str, str] = MappingProxyType({}),
    ) -> VariantStore:
        """Open a store, or begin an empty one where `directory` has none.

        Args:
            directory: this rank's own directory; created if absent.
            fingerprint: identifies the base weights on this rank (checkpoint, dtype, slice).
            kernels: by format, the name of the kernel that runs here; none for formats without one.

        Raises:
            StoreError: it belongs to other weights or to another version, or cannot be read or created.
        """
        store = cls(Path(directory), fingerprint, kernels)
        try:
            private_directory(store.directory)
        except OSError as error:
            raise StoreError(
                f"cannot create the variant directory {store.directory}: {error}; configure another directory"
            ) from error
        with store._locked():
            store._load()
            store._remove_orphans()
        return store

    def has(self, layer: int, format: str, kernel: str | None = None) -> bool:
        """Return whether the layer is stored in `format`, as `kernel` (by default the one at `open`) packs it."""
        return self._key(layer, format, kernel) in self._rows

    def entry(self, layer: int, format: str) -> StoredLayer:
        """Return the manifest's row.

        Raises:
            StoreError: the layer is not stored in this format.
        """
        layer, format, kernel = key = self._key(layer, format)
        row = self._rows.get(key)
        if row is None:
            stored = sorted(f"{f} ({k})" if k else f for i, f, k in self._rows if i == layer)
            wanted = f"{format!r} for kernel {kernel!r}" if kernel else repr(format)
            raise StoreError(
                f"{self.directory} has no {wanted} of layer {layer}, found {stored or 'nothing'} for it; "
                "build this format first, or remove it from the configured formats"
            )
        return row

    def _key(self, layer: int, format: str, kernel: str | None = None) -> Key:
        return layer, format, self._kernels.get(format, "") if kernel is None else kernel

    def entries(self) -> tuple[StoredLayer, ...]:
        """Return all rows that `entry` finds, by layer and format."""
        return tuple(row for key, row in sorted(self._rows.items()) if key == self._key(*key[:2]))

    def nbytes(self, layer: int, format: str) -> int:
        """Return the bytes of the tensors of one stored layer."""
        return self.entry(layer, format).nbytes

    def require_space(self, nbytes: int) -> None:
        """Raise StoreError unless `nbytes` more fit on the disk. Call it with the total before building."""
        free = shutil.disk_usage(self.directory).free
        if nbytes + _SLACK_BYTES > free:
            raise StoreError(
                f"{self.directory} needs {nbytes + _SLACK_BYTES:,} bytes, free are {free:,}; "
                "free some space, or configure a directory on a larger disk"
            )

    def write(self, layer: int, format: str, tensors: LayerTensors, kernel: str = "") -> StoredLayer:
        """Store one layer, replacing what was there for this kernel. Safe against crashes and other writers.

        Raises:
            StoreError: too little space (nothing was written), or the disk refused.
        """
        flat = flatten(tensors)
        nbytes = sum(tensor.nbytes for tensor in flat.values())
        shapes = {key: list(tensor.shape) for key, tensor in sorted(flat.items())}
        sizes = {name: sum(tensor.nbytes for tensor in parts.values()) for name, parts in sorted(tensors.items())}
        with self._locked():
            self._load()
            self._remove_orphans()
            self.require_space(nbytes)
            partial = self.directory / f"layer-{layer:04d}.{format}{_PARTIAL}"
            try:
                sha256, size = write_file(partial, tensors)
                name = f"layer-{layer:04d}.{format}.{sha256[:16]}{_SUFFIX}"
                row = StoredLayer(layer, format, kernel, name, sha256, size, nbytes, shapes, sizes)
                os.replace(partial, self.directory / name)
                self._files.drop(name)  # of the same name and content, but damaged
                self._save({**self._rows, (layer, format, kernel): row})
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise StoreError(
                    f"cannot write layer {layer} {format!r} ({nbytes:,} bytes) to {self.directory}: {error}; "
                    "check space and permissions, or configure another directory"
                ) from error
            self._remove_orphans()
        return row

    def read(
        self, layer: int, format: str, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, dict[str, Tensor]]:
        """Read the tensors of one layer, {linear: {tensor name: tensor}}, into fresh memory.

        Checks the file's size and structure, and the tensors against what `verify` has seen: blake3 costs less than
        the read.

        Args:
            layer: decoder layer id.
            format: that it is stored in.
            wanted: whether to read a linear, by its name.

        Raises:
            StoreError: not stored, missing, truncated, or not what the manifest says.
        """
        row = self.entry(layer, format)
        path = self.directory / row.file
        with self._files.opened(row.file, row.size) as file:
            try:
                tensors = read_file(path, file, wanted, self._digests.get(row.file, {}))
            except OSError as error:
                remedy = "Free memory: nothing is wrong with the file" if error.errno == errno.ENOMEM else self._remedy
                raise StoreError(f"cannot read {path}: {error}; {remedy}") from error
        found = {key: list(tensor.shape) for key, tensor in flatten(tensors).items()}
        expected = {key: shape for key, shape in row.shapes.items() if wanted(key.partition("/")[0])}
        if found != expected:
            raise StoreError(f"{path} holds {found}, expected {expected}; {self._remedy}")
        return tensors

    def verify(self, progress: Progress | None = None) -> None:
        """Hash every file against the manifest (about 1 GiB/s), and keep it open.

        Raises:
            StoreError: the first file that is missing, truncated or changed.
        """
        for _, fault in self.faults(self.entries(), progress):
            raise fault

    def faults(
        self, rows: Sequence[StoredLayer], progress: Progress | None = None
    ) -> list[tuple[StoredLayer, StoreError]]:
        """Hash files against the manifest, and keep them open. Return those that are missing, truncated or changed."""
        total, done = sum(row.size for row in rows), 0
        hold = self._files.may_hold(len(rows))
        found: list[tuple[StoredLayer, StoreError]] = []

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        for row in rows:
            try:
                self._verify(row, hold, on_bytes)
            except StoreError as error:
                found.append((row, error))
        return found

    def _verify(self, row: StoredLayer, hold: bool, on_bytes: Callable[[int], None]) -> None:
        path = self.directory / row.file
        with self._files.opened(row.file, row.size, hold) as file:
            try:
                sha256, digests = hashes_of(path, file, on_bytes)
            except OSError as error:
                raise StoreError(f"cannot read {path}: {error}; {self._remedy}") from error
        if sha256 != row.sha256:
            raise StoreError(f"{path} has sha256 {sha256}, expected {row.sha256}; {self._remedy}")
        self._digests[row.file] = digests

    def differing(self, layer: int, format: str, tensors: LayerTensors) -> list[str]:
        """Return which of `tensors`, as "linear/tensor", a verified file holds with other bytes, or not at all."""
        digests = self._digests[self.entry(layer, format).file]
        return [key for key, tensor in flatten(tensors).items() if digests.get(key) != tensor_digest(tensor)]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory against other writers; the lock dies with its process."""
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.directory / _LOCK))
            except OSError as error:
                raise StoreError(
                    f"cannot lock the variant directory {self.directory}: {error}; "
                    "make it writable, or configure another"
                ) from error
            yield

    @property
    def _remedy(self) -> str:
        return f"delete {self.directory}, and the next start builds it again"

    def _load(self) -> None:
        """Take over the manifest on disk. A row whose file has gone stays, so that `verify` reports it."""
        path = self.directory / _MANIFEST
        if not path.exists():
            self._rows = MappingProxyType({})
            return
        try:
            found = json.loads(path.read_text())
            schema, fingerprint = found["schema"], found["fingerprint"]
            rows = [StoredLayer(**row) for row in found["files"]] if schema == SCHEMA else []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} cannot be read ({error}); {self._remedy}") from error
        wanted = (("schema", schema, SCHEMA), ("fingerprint", fingerprint, self.fingerprint))
        for what, value, expected in wanted:
            if value != expected:
                raise StoreError(
                    f"{path} has {what} {value!r}, expected {expected!r}: it was built for another model, "
                    "slice or version; configure another directory, or delete this one"
                )
        self._rows = MappingProxyType({(row.layer, row.format, row.kernel): row for row in rows})

    def _save(self, rows: dict[Key, StoredLayer]) -> None:
        """Replace the manifest in one rename, after the files it names are on disk."""
        document = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "files": [asdict(rows[key]) for key in sorted(rows)],
        }
        partial = self.directory / f"{_MANIFEST}{_PARTIAL}"
        with partial.open("w") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.directory / _MANIFEST)
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # makes the renames themselves durable
        finally:
            os.close(descriptor)
        self._rows = MappingProxyType(dict(rows))

    def _remove_orphans(self) -> None:
        """Remove partial and unlisted files: under the lock no writer lives, so a crash's, or replaced ones."""
        listed = {row.file for row in self._rows.values()}
        for path in self.directory.glob("layer-*"):
            if path.suffix in (_SUFFIX, _PARTIAL) and path.name not in listed:
                path.unlink(missing_ok=True)
