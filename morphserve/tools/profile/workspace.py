"""What a profiling run has computed so far, on disk: a run that was killed goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from morphserve.errors import ProfilingError
from morphserve.files import replacing, write_whole
from quant_layers import private_directory

_SETTINGS = "settings.json"


class Workspace:
    """A directory of numbered results, each written whole or not at all. Hidden states of all layers lie here, so
    that memory does not grow with depth."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """Begin, or take over what a run with the same settings has left.

        Raises:
            ProfilingError: a run with other settings left something, or the disk refused.
        """
        self.directory = directory
        text = json.dumps(dict(settings), sort_keys=True, indent=1)
        file = directory / _SETTINGS
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            private_directory(directory)
            if file.exists() and file.read_text(encoding="utf-8") != text:
                raise ProfilingError(
                    f"{directory} holds an unfinished profile that was begun with other settings. Finish that one, "
                    f"or delete {directory}."
                )
            write_whole(file, text)
        except OSError as error:
            raise ProfilingError(f"{directory}: {error.strerror}. Give an --out on a disk with room.") from error

    def has(self, what: str, index: int) -> bool:
        """Return whether this result is there."""
        return self._file(what, index).exists()

    def load(self, what: str, index: int) -> Any:
        """Return a result that `has` reports.

        Raises:
            ProfilingError: it is damaged, or holds what `save` was never given: reading it must not run anything.
        """
        file = self._file(what, index)
        try:
            return torch.load(file, weights_only=True)
        except Exception as error:  # torch's reader raises whatever it trips over
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ProfilingError(f"{file} cannot be read ({why}). Delete {self.directory}, and start again.") from error

    def save(self, what: str, index: int, value: Any) -> None:
        """Store a result. Raises ProfilingError when the disk refuses."""
        file = self._file(what, index)
        try:
            with replacing(file) as partial:
                torch.save(value, partial)
        except (OSError, RuntimeError) as error:  # torch wraps what a full disk raises
            raise ProfilingError(f"cannot write {file}: {error}. Make room, start again: it goes on here.") from error

    def drop(self, what: str, index: int) -> None:
        """Harmless when it is not there."""
        self._file(what, index).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything: the profile is written, and nothing of this is needed any more."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, what: str, index: int) -> Path:
        return self.directory / f"{what}-{index:04d}.pt"
