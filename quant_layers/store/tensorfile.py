"""Tensors to and from safetensors files through plain reads: never through mapped file pages.

A mapped tensor would count as file cache, not as weights, and dropping it would free nothing that the KV
cache could use. Each tensor gets its own allocation, so that keeping a scale does not keep a weight.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from blake3 import blake3
from torch import Tensor

from quant_layers.errors import StoreError

LayerTensors = Mapping[str, Mapping[str, Tensor]]  # linear name -> tensor name -> tensor
Digests = Mapping[str, bytes]  # "linear/tensor" -> `tensor_digest`

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SEPARATOR = "/"  # linear names contain dots, never this
_CHUNK_BYTES = 1 << 22
_OWN_PAGES_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 26
_ALIGNMENT = 8  # the format's own: the header is padded with spaces to it


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, in place. Valid only while `tensor` lives."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def plain(tensor: Tensor) -> Tensor:
    """Return `tensor` as detached, contiguous CPU memory; itself where it already is."""
    return tensor.detach().cpu().contiguous()


def digest(tensors: LayerTensors) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes: equal digests mean byte-identical tensors."""
    total = hashlib.sha256()
    for key, tensor in sorted(flatten(tensors).items()):
        values = plain(tensor)
        total.update(f"{key}|{_NAMES[values.dtype]}|{tuple(values.shape)}|".encode())
        total.update(raw_bytes(values))
    return total.hexdigest()


def tensor_digest(tensor: Tensor) -> bytes:
    """Return a digest of dtype and bytes, of a hash that is as fast as they are read: against damage, not a forger."""
    values = plain(tensor)
    return blake3(_NAMES[values.dtype].encode()).update(raw_bytes(values)).digest()


def flatten(tensors: LayerTensors) -> dict[str, Tensor]:
    """Put all names on one level, as the file has them."""
    flat = {}
    for linear, parts in tensors.items():
        for name, tensor in parts.items():
            if not linear or not name or _SEPARATOR in linear + name:
                raise StoreError(
                    f"cannot store tensor {name!r} of linear {linear!r}: names must be non-empty and without "
                    f"{_SEPARATOR!r}; rename the linear"
                )
            flat[f"{linear}{_SEPARATOR}{name}"] = tensor
    return flat


def write_file(path: Path, tensors: LayerTensors) -> tuple[str, int]:
    """Write and fsync `path`. Returns (sha256, size in bytes) of what was written."""
    flat = {key: plain(tensor) for key, tensor in sorted(flatten(tensors).items())}
    header: dict[str, object] = {}
    offset = 0
    for key, tensor in flat.items():
        if tensor.dtype not in _NAMES:
            raise StoreError(f"cannot store {key} of {tensor.dtype}; known are {', '.join(_DTYPES)}")
        end = offset + tensor.nbytes
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    hashed = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for chunk in _chunks(text, flat.values()):
            file.write(chunk)
            hashed.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return hashed.hexdigest(), size


def _chunks(header: bytes, tensors: Iterable[Tensor]) -> Iterable[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield raw_bytes(tensor)


def read_file(
    path: Path,
    file: BinaryIO,
    wanted: Callable[[str], bool] = lambda _: True,
    digests: Digests = MappingProxyType({}),
) -> dict[str, dict[str, Tensor]]:
    """Tensors of `file`, unbuffered and at its beginning, each in fresh anonymous memory.

    Args:
        path: for messages; it may be gone.
        file: what `path` was when it was opened.
        wanted: whether to read a linear, by its name.
        digests: of tensors that are known; what is read must be the same.

    Raises:
        StoreError: the header does not describe the bytes that follow it, or a tensor has another digest.
        OSError: the file cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    header, start = _read_header(path, file, size)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        linear, _, name = key.partition(_SEPARATOR)
        if not wanted(linear):
            continue
        file.seek(start + entry["data_offsets"][0])
        tensor = _read_tensor(path, file, entry)
        if digests.get(key) not in (None, tensor_digest(tensor)):
            raise _damaged(path, f"{key} has changed since it was verified")
        tensors.setdefault(linear, {})[name] = tensor
    return tensors


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, dict[str, Any]], int]:
    length = int.from_bytes(_read_exactly(path, file, 8), "little")
    start = 8 + length
    if length > _MAX_HEADER_BYTES or start > size:
        raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
    try:
        header = json.loads(_read_exactly(path, file, length))
        header.pop("__metadata__", None)
        end = max((_checked(key, entry) for key, entry in header.items()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    if start + end != size:
        raise _damaged(path, f"its header describes {start + end} bytes, the file has {size}")
    return header, start


def _checked(key: str, entry: dict[str, Any]) -> int:
    """Return where the tensor's bytes end; before any room is made for it, or for what it claims to be.

    Raises:
        ValueError, KeyError, TypeError: the entry is none.
    """
    first, last = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (first, last, *entry["shape"])):
        raise ValueError(f"{key} has shape {entry['shape']} and bytes {first} to {last}, must be whole numbers from 0")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{key} has unknown dtype {entry['dtype']!r}")
    size = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
    if size != last - first:
        raise ValueError(f"{key} needs {size} bytes, its range has {last - first}")
    return last


def _read_tensor(path: Path, file: BinaryIO, entry: dict[str, Any]) -> Tensor:
    tensor = _fresh(entry["shape"], _DTYPES[entry["dtype"]])
    _fill(path, file, raw_bytes(tensor))
    return tensor


def _fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory that goes back to the system with the tensor, whatever thread asks and whoever is malloc."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _OWN_PAGES_BYTES:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _read_exactly(path: Path, file: BinaryIO, size: int) -> bytes:
    buffer = bytearray(size)
    _fill(path, file, memoryview(buffer))
    return bytes(buffer)


def _fill(path: Path, file: BinaryIO, buffer: memoryview) -> None:
    """Read until `memory` is full: one call returns at most about 2 GiB."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise _damaged(path, f"it ends {len(buffer) - done} bytes early")
        done += count


def sha256_of(file: BinaryIO, on_bytes: Callable[[int], None]) -> str:
    """Return the sha256 of a file from where it stands; `on_bytes` hears the size of every chunk read."""
    hashed = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        hashed.update(chunk)
        on_bytes(len(chunk))
    return hashed.hexdigest()


def hashes_of(path: Path, file: BinaryIO, on_bytes: Callable[[int], None]) -> tuple[str, dict[str, bytes]]:
    """Return the sha256 of a whole file at its beginning, and the digests of its tensors, read once.

    Args:
        path: for messages.
        file: unbuffered.
        on_bytes: hears the size of every chunk read.

    Raises:
        StoreError: the header cannot be read, or its tensors do not lie one behind the other.
        OSError: the file cannot be read.
    """
    header, start = _read_header(path, file, os.fstat(file.fileno()).st_size)
    file.seek(0)
    whole = hashlib.sha256(_read_exactly(path, file, start))
    on_bytes(start)
    digests, position = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != position:
            raise _damaged(path, f"{key} begins at {first}, expected {position}")
        own = blake3(str(entry["dtype"]).encode())
        while position < last:
            chunk = _read_exactly(path, file, min(_CHUNK_BYTES, last - position))
            position += len(chunk)
            whole.update(chunk)
            own.update(chunk)
            on_bytes(len(chunk))
        digests[key] = own.digest()
    return whole.hexdigest(), digests


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged: {what}; delete its directory, and the next start builds it again")
