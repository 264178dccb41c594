"""Options of command lines, declared once: as fields of the frozen dataclasses that they become."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, field, fields
from fractions import Fraction
from typing import Any, TypeVar

Model = TypeVar("Model")


def option(help: str | None = None, *, default: Any = MISSING, flag: str = "", unset: bool = False, **more: Any) -> Any:
    """Declare a field that is an option, too.

    Args:
        default: of both; without one the option is required. A flag where it is False.
        flag: where it is not called as the field.
        unset: the option's own default is None, which leaves the field at its default.
        more: of `add_argument`; `type` is the default's where nothing is given.
    """
    if default is False:
        more["action"] = "store_true"
    elif default is MISSING:
        more["required"] = True
    elif more.get("action") == "append":
        more["default"] = []
    else:
        more["default"] = None if unset else default
        if default is not None:
            more.setdefault("type", type(default))
    return field(default=default, metadata={"flag": flag, "argument": {"help": help, **more}})


def options_of(model: type) -> dict[str, Field[Any]]:
    """Return the fields that are options, by the names that `argparse` gives their values."""
    found = {}
    for each in fields(model):
        if each.metadata:
            found[(each.metadata["flag"] or each.name).removeprefix("--").replace("-", "_")] = each
    return found


def add_options(group: Any, model: type, only: Sequence[str] = (), skip: Sequence[str] = ()) -> None:
    """Add the options of a model to a parser, or a group of one.

    Args:
        only: names of fields; empty = all.
        skip: names of fields that are left out.
    """
    for name, each in options_of(model).items():
        if each.name not in skip and (not only or each.name in only):
            group.add_argument(as_flag(name), **each.metadata["argument"])


def read_options(model: Callable[..., Model], args: argparse.Namespace, /, **more: Any) -> Model:
    """Make a model of what the command line has of it; `more` goes before."""
    found = {each.name: getattr(args, name, None) for name, each in options_of(model).items()}  # type: ignore[arg-type]
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}
    return model(**given | more)


def given(args: argparse.Namespace, model: type, only: Sequence[str] = ()) -> Iterator[str]:
    """Yield the options that are not as they are by default; `only` as of `add_options`."""
    for name, each in options_of(model).items():
        if (not only or each.name in only) and getattr(args, name) != each.metadata["argument"].get("default", False):
            yield as_flag(name)


def as_flag(name: str) -> str:
    """Return the option of a field: --max-num-seqs of max_num_seqs."""
    return f"--{name.replace('_', '-')}"


def number(text: str) -> float:
    """Read a number or a fraction.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        above, slash, below = text.partition("/")
        return float(Fraction(int(above), int(below))) if slash else float(text)
    except (ValueError, ZeroDivisionError, OverflowError) as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a fraction such as 1/16") from e


def pair(kind: type[int] | type[float], words: str) -> Callable[[str], tuple[float, float]]:
    """Return what reads two numbers with a comma between them; `words` say what they are."""

    def read(text: str) -> tuple[float, float]:
        try:
            low, high = (kind(part) for part in text.split(","))
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from e
        return low, high

    return read
