"""Served quality by level, with the error of what few answers can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from morphserve.tools.quality.scoring import Scored
from morphserve.tools.workload import UNKNOWN

ALL = "all"


@dataclass(frozen=True, slots=True)
class LevelRow:
    """The tokens of one level of a run, or all."""

    level: str  # a number, or ALL
    tokens: int
    expected_kl: float | None  # nats a token, by the ladder; None where nobody has measured one of the levels
    served_kl: float  # nats a token
    served_kl_error: float | None  # one standard error of it, answers drawn as they come; None of a single one
    seen: float  # mean probability, at full precision, of the tokens that were recorded
    logprob: float  # mean log probability, at full precision, of the tokens that were served, nats

    def as_json(self) -> dict[str, Any]:
        """Return it for a program."""
        return asdict(self)


def level_rows(scored: Sequence[Scored], ladder: Mapping[int, float | None] | None) -> list[LevelRow]:
    """Return a row for all tokens, then one a level that has any.

    Args:
        scored: of one run.
        ladder: level |-> expected KL in nats a token; None = a server without levels, which is its own level 0.
    """
    levels = sorted({int(level) for answer in scored for level in np.unique(answer.levels)} - {UNKNOWN})
    rows = [_row(ALL, scored, [np.ones(len(answer.levels), bool) for answer in scored], ladder)]
    return rows + [_row(str(level), scored, [a.levels == level for a in scored], ladder) for level in levels]


def _row(
    name: str, scored: Sequence[Scored], chosen: Sequence[NDArray[np.bool_]], ladder: Mapping[int, float | None] | None
) -> LevelRow:
    counts = np.array([int(mask.sum()) for mask in chosen])
    tokens = int(counts.sum())
    sums = np.array([answer.kl[mask].sum() for answer, mask in zip(scored, chosen, strict=True)])
    mean = float(sums.sum()) / tokens

    def average(name: str) -> float:
        parts = [getattr(a, name)[mask] for a, mask in zip(scored, chosen, strict=True)]
        return float(np.concatenate(parts).mean())

    used = np.concatenate([answer.levels[mask] for answer, mask in zip(scored, chosen, strict=True)])
    return LevelRow(
        name, tokens, _expected(used, ladder), mean, _error(sums, counts, mean), average("seen"), average("logprob")
    )


def _expected(levels: NDArray[np.int16], ladder: Mapping[int, float | None] | None) -> float | None:
    if ladder is None:
        return 0.0
    each = {int(level): 0.0 if level == 0 else ladder.get(int(level)) for level in np.unique(levels)}
    if None in each.values():
        return None
    return math.fsum(kl * int((levels == level).sum()) for level, kl in each.items() if kl is not None) / len(levels)


def _error(sums: NDArray[np.float64], counts: NDArray[np.int64], mean: float) -> float | None:
    """Return the standard error of a ratio of sums over answers: tokens of one answer are no independent draws."""
    has_any = counts > 0
    number = int(has_any.sum())
    if number < 2:
        return None
    off = sums[has_any] - mean * counts[has_any]
    return math.sqrt(number / (number - 1) * float((off**2).sum())) / int(counts.sum())
