"""Has a file changed, and is somebody writing it? Known by looks at its modification time, size and inode alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from morphserve.control.reload.words import Told
from morphserve.errors import ConfigError

LOOK_INTERVAL_S = 1.0
_MAX_LOOKS = 5  # of a reload that is asked for, at a file that is being written

Stamp = tuple[tuple[int, int, int] | None, ...]  # (mtime_ns, size, inode) of each file; None = not there
T = TypeVar("T")


class WatchedFiles:
    """Files that editors truncate, or move away, and then write: what they hold counts once two looks agree."""

    def __init__(self, files: Callable[[], Sequence[Path]], pause: Callable[[float], None]) -> None:
        """Look at nothing yet.

        Args:
            files: to look at, as they are named now.
            pause: waits between two looks.
        """
        self._files = files
        self._pause = pause
        self._seen: Stamp = ()
        self._done: Stamp = ()

    @property
    def is_new(self) -> bool:
        """Whether nothing of them has been read yet."""
        return not self._done

    def changed(self, read: Callable[[], T]) -> T | None:
        """Return what `read` gives of files that have changed; None = none has, or somebody may be writing it."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            return None
        if stamp == self._done or _is_unfinished(stamp):
            return None  # seen to; or being written
        found = read()
        if self._stamp() != stamp:
            return None
        self._done = stamp
        return found

    def settled(self, read: Callable[[], T]) -> T | ConfigError:
        """Return what `read` gives of files that nobody was writing meanwhile, or that somebody is."""
        stamp: Stamp = ()
        for _ in range(_MAX_LOOKS):
            last, stamp = stamp, self._stamp()
            if stamp == last and not _is_unfinished(stamp):
                found = read()
                if self._stamp() == stamp:
                    self._seen = self._done = stamp
                    return found
            self._pause(LOOK_INTERVAL_S)
        what = "is empty, or not there" if _is_unfinished(stamp) else "is being written"
        return Told(f"the settings' file {what}. Write it, and ask again.")

    def _stamp(self) -> Stamp:
        return tuple(map(_stamp_of, self._files()))


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _is_unfinished(stamp: Stamp) -> bool:
    return any(file is None or file[1] == 0 for file in stamp)
