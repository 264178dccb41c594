"""A quantized checkpoint on disk: its files, its scheme, and its decoder layers one by one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant_layers.errors import CheckpointError
from quant_layers.formats.canonical import QuantW4, QuantW8
from quant_layers.sources.importers import Scheme, is_quantized, read_linear
from quant_layers.store.jsonfile import read_object

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_INDEX = "model.safetensors.index.json"
_PATTERN = "*.safetensors"
_REMEDY = "give a directory with a whole checkpoint in it, or fetch it again"
_MAX_SHOWN = 300  # characters of a config in a message
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_METHODS = ("gptq", "awq", "compressed-tensors")
# What reading a file of a checkpoint may raise: safetensors knows dtypes that torch does not have.
_UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
_SHAPE_KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImportedLayer:
    """One decoder layer of a checkpoint, by full names as the base model's checkpoint has them."""

    linears: Mapping[str, QuantW4 | QuantW8]  # module name |-> quantized weight
    others: Mapping[str, Tensor]  # tensor name |-> what is not quantized: norms, biases, linears left as they were


class Checkpoint:
    """A directory that GPTQ, AWQ or compressed-tensors tools wrote."""

    def __init__(self, directory: Path, scheme: Scheme, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Keep what `open`, which callers use, has read."""
        self.directory = directory
        self.scheme = scheme
        self.config = config
        self._files = files  # tensor name |-> file
        layers: dict[int, list[str]] = {}
        for name in files:
            if match := _LAYER.search(name):
                layers.setdefault(int(match[1]), []).append(name)
        self._layers = {layer: sorted(names) for layer, names in sorted(layers.items())}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read the configuration and the names of all tensors.

        Raises:
            CheckpointError: no such checkpoint, a scheme that is not supported, or a damaged file.
        """
        config = read_object(directory / "config.json", CheckpointError, _REMEDY)
        scheme = read_scheme(directory, config)
        return cls(directory, scheme, config, tensor_files(directory))

    @property
    def num_layers(self) -> int:
        """Decoder layers it has tensors of."""
        return len(self._layers)

    @property
    def digest(self) -> str:
        """Hash that changes when a file of it does: configuration, headers, sizes and times, not every byte."""
        total = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        total.update(repr(self.scheme).encode())
        for file in sorted(set(self._files.values())):
            status = file.stat()
            total.update(f"{file.name}|{status.st_size}|{status.st_mtime_ns}|".encode())
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                total.update(stream.read(min(length, _MAX_HEADER_BYTES)))
        return total.hexdigest()

    def check_shape(self, base: Mapping[str, Any]) -> None:
        """Compare what both configurations say about the model's shape.

        Args:
            base: of the base model, as config.json has it.

        Raises:
            CheckpointError: they differ.
        """
        differing = [
            f"{key} {_shown(self.config[key])} instead of {base[key]}"
            for key in _SHAPE_KEYS
            if self.config.get(key) is not None and base.get(key) is not None and self.config[key] != base[key]
        ]
        if differing:
            raise CheckpointError(
                f"{self.directory} is not a version of this model: it has {', '.join(differing)}; "
                "give the checkpoint that was quantized from it"
            )

    def layer(self, layer: int) -> ImportedLayer:
        """Read one decoder layer, in memory of its own.

        Raises:
            CheckpointError: it is not there, or cannot be read; see `read_linear`.
        """
        if layer not in self._layers:
            raise CheckpointError(f"{self.directory} has no decoder layer {layer}, it has {self.num_layers}")
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self._read(self._layers[layer]):
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = tensor
        linears: dict[str, QuantW4 | QuantW8] = {}
        others: dict[str, Tensor] = {}
        for module, parts in modules.items():
            if is_quantized(parts):
                bias = parts.pop("bias", None)
                linears[module] = read_linear(module, parts, self.scheme)
                if bias is not None:
                    others[f"{module}.bias"] = bias
            else:
                others |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        return ImportedLayer(MappingProxyType(linears), MappingProxyType(others))

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that belongs to no decoder layer.

        Raises:
            CheckpointError: one of them is quantized, or cannot be read.
        """
        names = [name for name in self._files if not _LAYER.search(name)]
        split = [name.rpartition(".") for name in names]
        if quantized := sorted({module for module, _, part in split if is_quantized([part])}):
            raise CheckpointError(
                f"{self.directory} has quantized {', '.join(quantized)}, outside the decoder layers: only those are "
                "swapped, so the checkpoint must leave the rest as it was. Quantize again without it."
            )
        yield from self._read(names)

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for file, mine in by_file.items():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in mine:
                        yield name, tensors.get_tensor(name).clone()  # not a view of the mapped file
            except _UNREADABLE as error:
                raise _damaged(file, error) from error


def read_scheme(directory: Path, config: Mapping[str, Any]) -> Scheme:
    """Read config.json's quantization_config, else AutoGPTQ's quantize_config.json.

    Raises:
        CheckpointError: neither is there, or names a method or a width that is not supported.
    """
    found = config.get("quantization_config")
    if found is None:
        file = directory / "quantize_config.json"
        if not file.exists():
            raise CheckpointError(
                f"{directory}: config.json has no quantization_config and there is no quantize_config.json; "
                "give a quantized checkpoint, or leave this format to round-to-nearest"
            )
        found = {"quant_method": "gptq"} | read_object(file, CheckpointError, _REMEDY)
    try:
        return _scheme_of(found, directory)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:  # a value of another kind than it is to be
        raise CheckpointError(
            f"{directory}: the quantization config {_shown(found)} cannot be read ({error}); {_REMEDY}"
        ) from error


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


def _scheme_of(found: Mapping[str, Any], directory: Path) -> Scheme:
    """Return what a quantization config means.

    Raises:
        CheckpointError: it names what is not supported.
        ValueError, TypeError, AttributeError: a value is of another kind than it is to be.
    """
    method = str(found.get("quant_method", "")).lower()
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise CheckpointError(f"{directory}: quant_method {_shown(method)} is not known; known are {known}")
    group_sizes = _group_sizes(found)
    if method == "compressed-tensors":
        return Scheme(method, 0, True, 0, group_sizes)
    bits = int(found.get("bits", found.get("w_bit", 4)))
    if bits not in (4, 8):
        raise CheckpointError(f"{directory}: {method} with {_shown(bits)} bits; kernels here run 4 and 8")
    if method == "awq":
        version = str(found.get("version", "gemm")).lower()
        if version != "gemm":
            raise CheckpointError(f"{directory}: AWQ layout {_shown(version)} is not known; known is gemm")
        return Scheme(method, bits, not found.get("zero_point", True), 0, group_sizes)
    version = str(found.get("checkpoint_format", "gptq")).lower()
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{directory}: GPTQ layout {_shown(version)} is not known; known are gptq and gptq_v2")
    return Scheme(method, bits, bool(found.get("sym", True)), 1 if version == "gptq" else 0, group_sizes)


def _group_sizes(found: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the group sizes of a quantization config; see `Scheme`."""
    schemes = [(scheme or {}).get("weights") or {} for scheme in (found.get("config_groups") or {}).values()]
    sizes = [scheme.get("group_size") for scheme in schemes] or [found.get("group_size", found.get("q_group_size", 0))]
    return tuple(sorted({-1 if size is None else int(size) for size in sizes} - {0}))


def tensor_files(directory: Path) -> dict[str, Path]:
    """Map tensor names to files of a directory, from the index, else from the files themselves.

    Raises:
        CheckpointError: a file is missing or damaged, or there is none.
    """
    index = directory / _INDEX
    if index.exists():
        names = read_object(index, CheckpointError, _REMEDY).get("weight_map", {})
        if not isinstance(names, dict) or not all(map(_is_name, names.values())):
            raise CheckpointError(f"{index}: weight_map is no object of file names; {_REMEDY}")
        files = {name: directory / file for name, file in names.items()}
        if absent := sorted({file.name for file in files.values() if not file.exists()}):
            raise CheckpointError(f"{directory} lacks {', '.join(absent)}, which its index names; fetch it again")
        return files
    files = {}
    for file in sorted(directory.glob(_PATTERN)):
        try:
            with safe_open(file, framework="pt") as tensors:
                files |= dict.fromkeys(tensors.keys(), file)
        except _UNREADABLE as error:
            raise _damaged(file, error) from error
    if not files:
        raise CheckpointError(f"{directory} has no {_PATTERN} files; convert the checkpoint to safetensors")
    return files


def _is_name(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read ({error}); fetch the checkpoint again")
