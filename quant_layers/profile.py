"""What was measured offline for one model: a directory of safetensors and a manifest that vouches for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import ProfileError
from .tensorfile import read_file, sha256_of, write_file

SCHEMA = 1
MANIFEST = "manifest.json"
_SMOOTHING = "smoothing.safetensors"
_REMEDY = "make it again with scripts/profile_layers.py"

LayerScales = Mapping[int, Mapping[str, Tensor]]  # decoder layer id |-> linear |-> fp32 [K]


def base_fingerprint(norms: Mapping[str, Tensor]) -> str:
    """Digest of the norms of all decoder layers: small, never sliced over ranks, and no two models share them.

    Args:
        norms: by name below the list of layers, for example `3.input_layernorm.weight`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(norms.items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile, read and verified."""

    directory: Path
    fingerprint: str  # see `base_fingerprint`
    scales: LayerScales  # what W8 divides the inputs of each linear by
    digest: str  # of all that changes packed variants
    made: Mapping[str, Any]  # how, from what, with which versions
    figures: Mapping[str, Any]  # what was measured

    def check_base(self, fingerprint: str, model: str) -> None:
        """
        Raises:
            ProfileError: it was made for other weights.
        """
        if fingerprint != self.fingerprint:
            raise ProfileError(
                f"profile {self.directory} was made for other weights (norms {self.fingerprint[:12]}) than {model} "
                f"has (norms {fingerprint[:12]}); {_REMEDY}, or leave out `profile`"
            )


def write_profile(
    directory: Path, fingerprint: str, scales: LayerScales, made: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Write a whole profile or nothing: it appears in one rename.

    Raises:
        ProfileError: something is there already, or the disk refused.
    """
    if directory.exists():
        raise ProfileError(f"{directory} exists; give another --out, or delete it")
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        tensors = {f"{layer}:{name}": {"scale": s} for layer, row in scales.items() for name, s in row.items()}
        sha256, size = write_file(partial / _SMOOTHING, tensors)
        document = {
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "files": {_SMOOTHING: {"sha256": sha256, "size": size}},
            "made": dict(made),
            "figures": dict(figures),
        }
        (partial / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, directory)
    except OSError as error:
        raise ProfileError(f"cannot write {directory}: {error.strerror}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_profile(directory: str | os.PathLike[str]) -> Profile:
    """Read a profile and verify it.

    Raises:
        ProfileError: no manifest, unknown schema, or a file that is missing, truncated or changed.
    """
    root = Path(directory).expanduser()
    path = root / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}; {_REMEDY}") from error
    except ValueError as error:
        raise ProfileError(f"{path} is no JSON ({error}); {_REMEDY}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise ProfileError(f"{path} has schema {found!r}, known is {SCHEMA}; {_REMEDY}")
    try:
        row = document["files"][_SMOOTHING]
        fingerprint, made, figures = document["fingerprint"], document["made"], document["figures"]
        expected, size = row["sha256"], row["size"]
    except (KeyError, TypeError) as error:
        raise ProfileError(f"{path} lacks {error}; {_REMEDY}") from error
    scales: dict[int, dict[str, Tensor]] = {}
    file = root / _SMOOTHING
    try:
        with file.open("rb", buffering=0) as stream:
            found_size = os.fstat(stream.fileno()).st_size
            if found_size != size:
                raise ProfileError(f"{file} has {found_size:,} bytes, expected {size:,}; {_REMEDY}")
            sha256 = sha256_of(stream, lambda _: None)
            if sha256 != expected:
                raise ProfileError(f"{file} has sha256 {sha256}, expected {expected}; {_REMEDY}")
            stream.seek(0)
            tensors = read_file(file, stream)
    except OSError as error:
        raise ProfileError(f"{file}: {error.strerror}; {_REMEDY}") from error
    for key, parts in tensors.items():
        layer, _, name = key.partition(":")
        scales.setdefault(int(layer), {})[name] = parts["scale"]
    return Profile(root, fingerprint, scales, expected, made, figures)
