"""What was measured offline for one model: a directory of safetensors and a manifest that vouches for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quant_layers.errors import ProfileError
from quant_layers.store.jsonfile import read_object
from quant_layers.store.tensorfile import read_file, sha256_of, write_file

SCHEMA = 2  # 1 had no ladder
MANIFEST = "manifest.json"
_SMOOTHING = "smoothing.safetensors"
_REMEDY = "make it again with `morphserve profile`"

LayerScales = Mapping[int, Mapping[str, Tensor]]  # decoder layer id |-> linear |-> fp32 [K]


def base_fingerprint(norms: Mapping[str, Tensor]) -> str:
    """Hash the norms of all decoder layers: small, never sliced over ranks, and no two models share them.

    Args:
        norms: by name below the list of layers, for example `3.input_layernorm.weight`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(norms.items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ProfileLevel:
    """One level of a profile's ladder."""

    layers: Mapping[int, str]  # decoder layer id |-> format; the others are at full precision
    expected_kl: float  # nats per token, from calibration text
    measured_kl: float | None = None  # through the serving kernels, on text that calibration did not see
    bytes_freed: int = 0  # of all layers, one rank
    step_time_factor: float | None = None  # over level 0, on the machine that measured it

    @property
    def kl(self) -> float:
        """The better figure of the two."""
        return self.expected_kl if self.measured_kl is None else self.measured_kl

    def as_json(self, level: int) -> dict[str, Any]:
        """Return a row of `ladder`."""
        return {
            "level": level,
            "expected_kl": self.expected_kl,
            "measured_kl": self.measured_kl,
            "bytes_freed": self.bytes_freed,
            "step_time_factor": self.step_time_factor,
            "layers": {str(layer): fmt for layer, fmt in sorted(self.layers.items())},
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile, read and verified."""

    directory: Path
    fingerprint: str  # see `base_fingerprint`
    scales: LayerScales  # what W8 divides the inputs of each linear by
    digest: str  # of all that changes packed variants
    made: Mapping[str, Any]  # how, from what, with which versions
    figures: Mapping[str, Any]  # what was measured
    num_layers: int
    ladder: tuple[ProfileLevel, ...]  # level 0 first
    order: tuple[int, ...]  # layer ids, least harmful first

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that its ladder uses, in the order in which they come in."""
        return tuple(dict.fromkeys(fmt for level in self.ladder for fmt in level.layers.values()))

    def check_base(self, fingerprint: str, model: str) -> None:
        """Raise ProfileError when it was made for other weights."""
        if fingerprint != self.fingerprint:
            raise ProfileError(
                f"profile {self.directory} was made for other weights (norms {self.fingerprint[:12]}) than {model} "
                f"has (norms {fingerprint[:12]}); {_REMEDY}, or leave out `profile`"
            )


def write_profile(
    directory: Path,
    fingerprint: str,
    scales: LayerScales,
    ladder: Sequence[ProfileLevel],
    order: Sequence[int],
    made: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> None:
    """Write a whole profile or nothing: it appears in one rename.

    Args:
        directory: must not exist.
        fingerprint: see `base_fingerprint`.
        scales: by layer and linear; empty for none.
        ladder: level 0 first.
        order: every layer id once.
        made: how, from what, with which versions.
        figures: what was measured, for reading.

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
            "num_layers": len(order),
            "files": {_SMOOTHING: {"sha256": sha256, "size": size}},
            "ladder": [level.as_json(index) for index, level in enumerate(ladder)],
            "order": list(order),
            "made": dict(made),
            "figures": dict(figures),
        }
        document["sha256"] = _sha256_of_document(document)
        (partial / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, directory)
    except OSError as error:
        raise ProfileError(f"cannot write {directory}: {error.strerror}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_profile(directory: str | os.PathLike[str], *, with_scales: bool = True) -> Profile:
    """Read a profile and verify it.

    Args:
        directory: that `write_profile` wrote.
        with_scales: False to read the manifest alone.

    Raises:
        ProfileError: no manifest, unknown schema, or a file that is missing, truncated or changed.
    """
    root = Path(os.path.expanduser(directory))  # which leaves a `~name` that nobody has: it is not there
    path = root / MANIFEST
    document = _read_manifest(path)
    try:
        row = document["files"][_SMOOTHING]
        ladder = tuple(_read_level(entry) for entry in document["ladder"])
        profile = Profile(
            root, document["fingerprint"], {}, row["sha256"], document["made"], document["figures"],
            document["num_layers"], ladder, tuple(document["order"]),
        )  # fmt: skip
        size = row["size"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"{path} lacks {error}; {_REMEDY}") from error
    return replace(profile, scales=_read_scales(root / _SMOOTHING, profile.digest, size)) if with_scales else profile


def _read_manifest(path: Path) -> dict[str, Any]:
    document = read_object(path, ProfileError, _REMEDY)
    if document.get("schema") != SCHEMA:
        raise ProfileError(f"{path} has schema {document.get('schema')!r}, known is {SCHEMA}; {_REMEDY}")
    expected = document.pop("sha256", None)
    found = _sha256_of_document(document)
    if found != expected:
        raise ProfileError(f"{path} was changed: its content has sha256 {found}, it says {expected}; {_REMEDY}")
    return document


def _sha256_of_document(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read_level(entry: Mapping[str, Any]) -> ProfileLevel:
    return ProfileLevel(
        {int(layer): fmt for layer, fmt in entry["layers"].items()},
        entry["expected_kl"],
        entry["measured_kl"],
        entry["bytes_freed"],
        entry["step_time_factor"],
    )


def _read_scales(file: Path, expected: str, size: int) -> LayerScales:
    scales: dict[int, dict[str, Tensor]] = {}
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
    return scales
