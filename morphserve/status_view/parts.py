"""The parts that are shown of an engine: words, and how worrying they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Line:
    """One figure, or a few that belong together."""

    label: str
    text: str
    note: str = ""  # what exactly it is
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """A share of something."""

    label: str
    text: str
    share: float  # [0, 1]
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class LevelRow:
    """A level of the ladder."""

    level: str
    layers: str
    kv_blocks: str
    kl: str
    tokens: str
    mark: str  # "here", "target", or nothing


@dataclass(frozen=True, slots=True)
class Change:
    """A transition that has ended."""

    revision: int
    ago: str
    move: str
    outcome: str
    took: str
    why: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One engine."""

    title: str
    summary: str  # all that fits on one line
    tone: Tone
    bars: tuple[Bar, ...]
    lines: tuple[Line, ...]
    levels: tuple[LevelRow, ...]
    changes: tuple[Change, ...]  # the newest first
