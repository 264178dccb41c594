"""What a command can know before it works for minutes: files that it reads, places that it writes to, numbers."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from morphserve.errors import ConfigError
from morphserve.user_input import user_path


def check_texts(files: Iterable[Path], option: str) -> None:
    """Refuse what is no text.

    Raises:
        ConfigError: which file, and why.
    """
    for file in files:
        try:
            if not user_path(file).read_text(encoding="utf-8").strip():
                raise ConfigError(f"{option} {file}: there is nothing in it. Give a text.")
        except OSError as e:
            raise ConfigError(f"{option} {file}: {e.strerror}. Give a text file.") from e
        except UnicodeDecodeError as e:
            raise ConfigError(f"{option} {file}: not UTF-8 text ({e.reason} at byte {e.start}). Give another.") from e


def check_new_file(file: Path, option: str) -> None:
    """Refuse a file that could not be written.

    Raises:
        ConfigError: why.
    """
    file = user_path(file)
    if file.is_dir():
        raise ConfigError(f"{option} {file} is a directory. Give a file.")
    _check_place(file.parent, option, file)


def check_directory(directory: Path, option: str) -> None:
    """Refuse a directory that could not be made, or written into; nothing is made.

    Raises:
        ConfigError: why.
    """
    directory = user_path(directory)
    place = directory.absolute()
    while not os.path.lexists(place):
        place = place.parent
    _check_place(place, option, directory)


def _check_place(place: Path, option: str, wanted: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as e:
        raise ConfigError(f"{option} {wanted}: {e.strerror}. Give a place that exists and can be written to.") from e


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number for `argparse`, which says what is wrong with it."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from e
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too few, must be at least {least}")
        return number

    return read


def between(low: float, high: float) -> Callable[[str], float]:
    """Return what reads a number from `low` up to, and without, `high`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from e
        if not low <= number < high:
            raise argparse.ArgumentTypeError(f"{text} is out of bounds, must be {low:g} or more, below {high:g}")
        return number

    return read


def more_than_zero(text: str) -> float:
    """Read a finite number above 0, for `argparse`."""
    try:
        number = float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from e
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is out of bounds, must be above 0")
    return number
