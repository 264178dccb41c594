"""How long an engine step takes, by what is in it and by the format of the layers: fitted by `morphserve calibrate`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from policies.types import BASE_FORMAT, Ladder, MorphLevel

SCHEMA = 1
_ATTENTION_SHARE = 1 / 6  # of the weights of a usual decoder layer, and so about of its matmuls' time


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step: base + per_seq * seqs + per_prefill_token * new tokens + per_context_token * KV tokens."""

    base_s: float
    per_seq_s: float
    per_prefill_token_s: float  # of tokens beyond one a sequence
    per_context_token_s: float  # of KV that attention reads

    def seconds(self, num_seqs: float, prefill_tokens: float, context_tokens: float) -> float:
        """Return how long one step takes."""
        return (
            self.base_s
            + self.per_seq_s * num_seqs
            + self.per_prefill_token_s * prefill_tokens
            + self.per_context_token_s * context_tokens
        )


@dataclass(frozen=True, slots=True)
class LayerMove:
    """The time that switching layers costs, on the slowest rank."""

    degrade_s: float  # a layer
    restore_s: float


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The step times that calibration measured on one machine with one model.

    Layers in different formats add up: a step of a level takes the mean over its layers of what it takes with
    all layers in that format.
    """

    formats: Mapping[str, StepTime]  # all layers in that format; BASE_FORMAT is always there
    move: LayerMove
    offset_s: float = 0.0  # from a request's arrival to the queue, and from its token to the client
    residuals: Mapping[str, float] | None = None  # by format: root mean square of the relative error of the fit
    model: str = ""
    machine: str = ""
    dtype: str = ""  # of the activations and the base weights, as bfloat16
    tier: str = ""  # of the CPU that was timed, emulated or not; as morphserve.cpu_tier has them
    cores: str = ""  # of it that computed; as `Place.cores` of morphserve.prepared has them

    @property
    def scatter(self) -> float:
        """Relative error of a step's time after the fit, over all formats; 0 where calibration did not say."""
        known = list((self.residuals or {}).values())
        return sum(known) / len(known) if known else 0.0

    def of_level(self, level: MorphLevel) -> StepTime:
        """Return the mean over the level's layers.

        Raises:
            ValueError: a format of the level was never calibrated.
        """
        parts = [self._of_format(fmt) for fmt in level.layer_formats]
        return StepTime(*(math.fsum(column) / len(parts) for column in zip(*parts, strict=True)))

    def of_ladder(self, ladder: Ladder) -> tuple[StepTime, ...]:
        """Return the times of each level.

        Raises:
            ValueError: as `of_level`.
        """
        return tuple(self.of_level(level) for level in ladder)

    def _of_format(self, fmt: str) -> tuple[float, float, float, float]:
        halves = fmt.split("/")
        shares = (1.0,) if len(halves) == 1 else (_ATTENTION_SHARE, 1 - _ATTENTION_SHARE)
        total = [0.0, 0.0, 0.0, 0.0]
        for half, share in zip(halves, shares, strict=True):
            time = self.formats.get(half)
            if time is None:
                raise ValueError(
                    f"step times of format {half!r} are not known, only those of {', '.join(self.formats)}. Run "
                    "`morphserve calibrate` with the config whose ladder has it."
                )
            own = (time.base_s, time.per_seq_s, time.per_prefill_token_s, time.per_context_token_s)
            total = [a + share * b for a, b in zip(total, own, strict=True)]
        return (total[0], total[1], total[2], total[3])

    def document(self) -> dict[str, Any]:
        """Return plain values for JSON, as `parse_step_times` reads them."""
        return {"schema": SCHEMA, **asdict(self), "formats": {k: asdict(v) for k, v in self.formats.items()}}


def load_step_times(path: Path) -> StepTimes:
    """Read what `StepTimes.document` gave from a JSON file.

    Raises:
        ValueError: unreadable, of another schema, or with figures that are no times.
    """
    remedy = "Make it with `morphserve calibrate`."
    try:
        raw = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"step times {path}: {e.strerror}. {remedy}") from e
    except (ValueError, RuntimeError) as e:  # nested too deep, or no such home directory
        raise ValueError(f"step times {path}: not JSON ({e}). {remedy}") from e
    return parse_step_times(raw, f"step times {path}")


def parse_step_times(raw: object, source: str) -> StepTimes:
    """Check what was read already.

    Raises:
        ValueError: of another schema, or with figures that are no times; says `source`.
    """
    remedy = "Make it with `morphserve calibrate`."
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{source}: schema {found!r}, this version reads {SCHEMA}. {remedy}")
    try:
        times = StepTimes(
            formats={str(fmt): StepTime(**figures) for fmt, figures in raw["formats"].items()},
            move=LayerMove(**raw["move"]),
            offset_s=raw["offset_s"],
            residuals=raw.get("residuals"),
            model=raw.get("model", ""),
            machine=raw.get("machine", ""),
            dtype=raw.get("dtype", ""),
            tier=raw.get("tier", ""),
            cores=raw.get("cores", ""),
        )
        _check(times)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise ValueError(f"{source}: {e}. {remedy}") from e
    return times


def _check(times: StepTimes) -> None:
    if BASE_FORMAT not in times.formats:
        raise ValueError(f"no times of {BASE_FORMAT!r}, only of {', '.join(times.formats) or 'nothing'}")
    for fmt, time in times.formats.items():
        figures: Sequence[float] = (time.base_s, time.per_seq_s, time.per_prefill_token_s, time.per_context_token_s)
        if not all(isinstance(f, int | float) and math.isfinite(f) and f >= 0 for f in figures) or time.base_s <= 0:
            raise ValueError(f"times of {fmt!r} are {figures}, must be 0 s or more, and the first above 0")
    for name, seconds in (
        ("move.degrade_s", times.move.degrade_s),
        ("move.restore_s", times.move.restore_s),
        ("offset_s", times.offset_s),
    ):
        if not (isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{name} is {seconds!r}, must be 0 s or more")
