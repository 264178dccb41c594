"""A model's name by what its tensors are, cheap enough for each start.

Every tensor counts with its name, dtype and shape; a small one (norms, biases) with all of its bytes, a large one with
those of eight places. So a copy, another file name or another split into files is the same model, and whatever trains,
merges or rounds a model makes another one. What it does not tell apart is an edit of single weights between those
places. That would make figures slightly wrong and no answer: a profile's scales change no result whatever the weights
are, and workers hold its norms, all of them, against those that were loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_INDEX = "model.safetensors.index.json"
_WHOLE_BYTES = 1 << 16  # a tensor up to this counts with all of its bytes
_PLACES = 8  # of a larger one
_PLACE_BYTES = 1 << 12
_HEADER_BYTES = 100 << 20  # safetensors' own limit
# What two models with the same tensors may differ in: how these are cut into heads.
_KEYS = ("architectures", "head_dim", "num_attention_heads", "num_key_value_heads")


def weights_fingerprint(directory: Path) -> str | None:
    """Return 64 hex digits; None for a directory without readable safetensors and config.json."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        rows = dict(row for file in _files(directory) for row in _tensors(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    if not rows or not isinstance(config, dict):
        return None
    digest = hashlib.sha256(json.dumps([config.get(key) for key in _KEYS]).encode())
    for name in sorted(rows):
        digest.update(f"{name}|".encode() + rows[name])
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.exists():
        return [directory / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return sorted(directory.glob("*.safetensors"))


def _tensors(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each tensor's name, and the digest of what counts of it."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= _HEADER_BYTES:
            raise ValueError(f"{file} is no safetensors file")
        header: dict[str, Any] = json.loads(stream.read(length))
        for name, row in header.items():
            if name != "__metadata__":
                start, end = row["data_offsets"]
                digest = hashlib.sha256(f"{row['dtype']}{row['shape']}".encode())
                for part in _parts(stream, 8 + length + start, end - start):
                    digest.update(part)
                yield name, digest.digest()


def _parts(stream: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    places = [(start, size)]
    if size > _WHOLE_BYTES:
        stride = (size - _PLACE_BYTES) // (_PLACES - 1)
        places = [(start + place * stride, _PLACE_BYTES) for place in range(_PLACES)]
    for offset, count in places:
        part = os.pread(stream.fileno(), count, offset)
        if len(part) != count:
            raise ValueError(f"{stream.name} is cut off")
        yield part
