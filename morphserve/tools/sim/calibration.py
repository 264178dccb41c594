"""What a simulation needs of one machine and one model: the file that `morphserve calibrate` makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphserve.control import RankBytes
from morphserve.errors import ConfigError
from morphserve.files import write_whole
from policies import BASE_FORMAT, StepTimes, load_step_times

_KEY = "model_bytes"
_WEIGHTS = "weights"
_REMEDY = "Make it with `morphserve calibrate`."


@dataclass(frozen=True, slots=True)
class Calibration:
    """The step times of one machine and model, and the bytes that a ladder is built from."""

    times: StepTimes
    rank: RankBytes  # all layers on one rank
    num_layers: int
    block_size: int  # tokens of a KV block of `rank.kv_block_bytes`
    weights: str = ""  # of the model, see `morphserve.prepared`; empty = not known

    def __post_init__(self) -> None:
        problems = [
            f"{fmt!r} has {len(sizes)} layers"
            for fmt, sizes in self.rank.layers.items()
            if len(sizes) != self.num_layers
        ]
        if BASE_FORMAT not in self.rank.layers:
            problems.append(f"no bytes of {BASE_FORMAT!r}")
        if problems or self.num_layers < 1:
            raise ValueError(f"{_KEY}.layers: {'; '.join(problems) or 'none'}, the model has {self.num_layers} layers")
        if not all(type(size) is int and size > 0 for sizes in self.rank.layers.values() for size in sizes):
            raise ValueError(f"{_KEY}.layers: every size must be a whole number of 1 byte or more")
        for name, value in (("kv_block_bytes", self.rank.kv_block_bytes), ("block_size", self.block_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{_KEY}.{name} is {value!r}, must be a whole number of 1 or more")

    def rank_with(self, block_size: int) -> RankBytes:
        """Return the rank with KV blocks of so many tokens.

        Raises:
            ConfigError: blocks of that size are not a whole number of bytes.
        """
        num_bytes, rest = divmod(self.rank.kv_block_bytes * block_size, self.block_size)
        if rest:
            raise ConfigError(
                f"KV blocks of {block_size} tokens: {self.rank.kv_block_bytes} B for {self.block_size} tokens do not "
                f"divide. Take a block size that {self.block_size} divides, or calibrate with this one."
            )
        return RankBytes(self.rank.layers, num_bytes)

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all. `policies.load_step_times` reads its part of it."""
        model_bytes = {
            "layers": {fmt: list(sizes) for fmt, sizes in self.rank.layers.items()},
            "kv_block_bytes": self.rank.kv_block_bytes,
            "block_size": self.block_size,
        }
        document = {**self.times.document(), _WEIGHTS: self.weights, _KEY: model_bytes}
        write_whole(path, json.dumps(document, indent=2) + "\n")


def load_calibration(path: Path) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises:
        ConfigError: unreadable, of another schema, without the model's bytes, or with figures that make no sense.
    """
    try:
        times = load_step_times(path)
        raw: Mapping[str, Any] = json.loads(path.expanduser().read_text(encoding="utf-8"))
        if _KEY not in raw:
            raise ValueError(f"step times {path}: no {_KEY!r}, so no ladder can be built from it. {_REMEDY}")
    except ValueError as e:
        raise ConfigError(str(e)) from e
    try:
        sizes = raw[_KEY]
        layers = {str(fmt): list(figures) for fmt, figures in sizes["layers"].items()}
        num_layers = len(layers.get(BASE_FORMAT, ()))
        rank = RankBytes(layers, sizes["kv_block_bytes"])
        return Calibration(times, rank, num_layers, sizes["block_size"], str(raw.get(_WEIGHTS, "")))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        what = f"key {e.args[0]!r} is missing" if isinstance(e, KeyError) else e
        raise ConfigError(f"step times {path}: {what}. {_REMEDY}") from e
