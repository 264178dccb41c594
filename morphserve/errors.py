"""Errors a user can act on: each message says the value, the limit and the remedy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import TypeVar

State = TypeVar("State", bound=Enum)


class MorphServeError(Exception):
    """Base of every error that MorphServe raises on purpose."""


class ConfigError(MorphServeError, ValueError):
    """The configuration, or its combination with this model or server, cannot work."""


class OrderError(MorphServeError, ValueError):
    """An operator's order is not taken."""

    def __init__(self, outcome: str, why: str) -> None:
        """Remember what became of it, in a word, and why."""
        super().__init__(why)
        self.outcome = outcome


class SeamError(MorphServeError, RuntimeError):
    """The installed vLLM is not the vLLM this plugin was written against."""


class LedgerError(MorphServeError, RuntimeError):
    """A reservation would exceed the memory budget of a rank."""


class IllegalTransition(MorphServeError, RuntimeError):
    """A transition was asked to make a move its state table does not have."""


def next_state(what: str, moves: Mapping[State, Collection[State]], old: State, new: State) -> State:
    """Return `new`, if the table of moves has it for `old`.

    Raises:
        IllegalTransition: it has not.
    """
    if new not in moves[old]:
        legal = ", ".join(sorted(state.name for state in moves[old])) or "none"
        raise IllegalTransition(f"{what}: {old.name} -> {new.name}; legal from here: {legal}.")
    return new


class StoreError(MorphServeError, RuntimeError):
    """A variant file is missing, truncated or belongs to other weights."""


class ProfilingError(MorphServeError):
    """A model cannot be profiled."""


class EngineLostError(MorphServeError, RuntimeError):
    """What a rank holds is unknown, or other than what the others hold: the engine ends rather than serve from it."""


class EngineEndedError(MorphServeError, RuntimeError):
    """The engine or a worker ended; the message is what ended it."""
