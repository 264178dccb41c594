"""Pieces of traces: `FILE:window=START,LEN:thin=4`, or a YAML list of such."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphserve.errors import ConfigError
from morphserve.shipped import workload_file
from morphserve.tools.options import options_of
from morphserve.tools.workload.errors import WorkloadError
from morphserve.tools.workload.workload import Workload, WorkloadSpec, load_workload
from morphserve.user_input import read_yaml, user_path

_OPTION = re.compile(r"^([a-z][a-z_-]*)=(.*)$")


@dataclass(frozen=True, slots=True)
class Window:
    """One workload and how it came about."""

    name: str  # unique among those read together
    source: str  # as a user may write it on the command line
    workload: Workload

    @property
    def digest(self) -> str:
        """Hash of its requests: the same file name may hold others tomorrow."""
        rows = [(r.arrival_s, r.input_tokens, r.output_tokens, r.hash_ids) for r in self.workload.requests]
        return hashlib.sha256(repr((self.workload.block_tokens, rows)).encode()).hexdigest()[:16]


def read_windows(texts: Sequence[str], seen: dict[str, int] | None = None) -> list[Window]:
    """Read all of them.

    Args:
        texts: windows as on the command line, or YAML files with lists of them.
        seen: how often each name was given out before; updated.

    Raises:
        WorkloadError: an option that is none, or a trace that cannot be read or of which nothing is left.
    """
    counts = {} if seen is None else seen
    return [_load(source, counts) for text in texts for source in _expand(text)]


def parse_window(text: str) -> WorkloadSpec:
    """Read one window as written on the command line.

    Raises:
        WorkloadError: an unknown option, or a value that is none.
    """
    file, options = _split(text)
    fields: dict[str, Any] = {}
    for name, value in options:
        if name not in _OPTIONS:
            raise WorkloadError(f"window {text!r}: unknown option {name!r}; there are {', '.join(_OPTIONS)}.")
        field, read = _OPTIONS[name].name, _OPTIONS[name].metadata["argument"]["type"]
        if field in fields:
            raise WorkloadError(f"window {text!r}: {name} is given twice. Leave one out.")
        try:
            fields[field] = read(value)
        except argparse.ArgumentTypeError as e:
            raise WorkloadError(f"window {text!r}: {name}={e}.") from e
        except ValueError as e:
            raise WorkloadError(f"window {text!r}: {name}={value!r} is not a whole number.") from e
    return WorkloadSpec(workload_file(file), **fields)


def _split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split file and options, from the right, because a file's name may have a colon in it."""
    parts = text.split(":")
    options: list[tuple[str, str]] = []
    while len(parts) > 1 and (match := _OPTION.match(parts[-1])):
        options.insert(0, (match[1].replace("-", "_"), match[2]))
        parts.pop()
    return ":".join(parts), options


def _load(source: str, seen: dict[str, int]) -> Window:
    workload = load_workload(parse_window(source))
    count = seen[workload.name] = seen.get(workload.name, 0) + 1
    return Window(workload.name if count == 1 else f"{workload.name}#{count}", source, workload)


def _expand(text: str) -> list[str]:
    """Turn a YAML list of windows into command-line texts; anything else stays as it is."""
    path = workload_file(text)
    if path.suffix not in (".yaml", ".yml"):
        return [text]
    try:
        raw = read_yaml(path, "windows")
    except ConfigError as e:
        raise WorkloadError(str(e)) from e
    if not isinstance(raw, list) or not raw:
        raise WorkloadError(f"windows {path}: must be a list of windows, such as `- {{file: mine.jsonl, thin: 4}}`.")
    return [_entry(path, number, entry) for number, entry in enumerate(raw)]


def _entry(path: Path, number: int, entry: object) -> str:
    if isinstance(entry, str):
        entry = {"file": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise WorkloadError(f"windows {path}: entry {number} is {entry!r:.80}, needs a `file`.")
    file: str | Path = entry["file"]
    beside = path.parent / user_path(file)
    if not entry["file"].startswith("synthetic:") and (beside.exists() or not Path(file).is_file()):
        file = beside  # of the list rather than of who reads it, who may have what a shipped list lacks
    options = [
        f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in entry.items()
        if name != "file"
    ]
    return ":".join([str(file), *options])


_OPTIONS = {name: each for name, each in options_of(WorkloadSpec).items() if each.name != "path"}
