"""What travels in the wheel for the commands: windows of real traffic, a text, policies' YAMLs; with their licences.

A name without a directory means what is shipped under it where no such file exists: `--workload convD`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

_SUFFIXES = ("", ".jsonl", ".yaml", ".txt")


def workload_file(name: str) -> Path:
    """Return the file of that name, or the window (or list of windows) that is shipped under it."""
    return _found(name, _WORKLOADS)


def config_file(name: str) -> Path:
    """Return the file of that name, or the YAML that is shipped under it."""
    return _found(name, _CONFIGS)


def text_file(name: str) -> Path:
    """Return the file of that name, or the text that is shipped under it."""
    return _found(name, _TEXTS)


def _found(name: str, directory: Path) -> Path:
    file = Path(name)
    with suppress(RuntimeError):  # a `~name` that nobody has: who reads the file says so
        file = file.expanduser()
    if name == file.name and not os.path.exists(file):
        for suffix in _SUFFIXES:
            if (shipped := directory / f"{name}{suffix}").is_file():
                return shipped
    return file


_WORKLOADS = Path(str(files(__name__) / "workloads"))
_TEXTS = Path(str(files(__name__) / "corpus"))
_CONFIGS = Path(str(files("policies") / "yaml"))
TEXT = _TEXTS / "wikitext2.txt"  # English prose, 150 kB
DEFAULT_CONFIG = _CONFIGS / "default.yaml"
SEARCH_SPACE = _CONFIGS / "space.yaml"
