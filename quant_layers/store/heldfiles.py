"""Files that stay readable after their names have gone."""

from __future__ import annotations

import logging
import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from quant_layers.errors import StoreError

logger = logging.getLogger(__name__)


class HeldFiles:
    """The files of one directory, of which those that it is told to hold stay open until it is dropped.

    Who cleans the cache while a server runs takes the files' names away, not what the server reads: without it
    the next restore would fail, and every one after it. Names carry a hash, so a name means one content.
    """

    def __init__(self, directory: Path, remedy: str) -> None:
        self._directory = directory
        self._remedy = remedy
        self._files: dict[str, BinaryIO] = {}
        weakref.finalize(self, _close, self._files)

    def may_hold(self, num_files: int) -> bool:
        """Return whether so many may be held; warn if not. Half of the descriptors are for connections."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY or num_files <= limit // 2:
            return True
        logger.warning(
            "%d variant files, but only %d files may be open: they are opened at each swap. Do not clean %s while "
            "the server runs, or raise ulimit -n to %d",
            num_files,
            limit,
            self._directory,
            2 * num_files,
        )
        return False

    def drop(self, name: str) -> None:
        """Hold a file no more. Harmless where it is not held."""
        if (file := self._files.pop(name, None)) is not None:
            file.close()

    @contextmanager
    def opened(self, name: str, size: int, hold: bool = False) -> Iterator[BinaryIO]:
        """Yield the file, unbuffered and at its beginning.

        Raises:
            StoreError: it is neither held nor there, or has another size.
        """
        path = self._directory / name
        file = self._files.get(name)
        try:
            if file is None:
                file = path.open("rb", buffering=0)
            found = os.fstat(file.fileno()).st_size
            file.seek(0)
        except OSError as error:
            raise StoreError(f"{path}: expected {size:,} bytes, found {error.strerror!r}; {self._remedy}") from error
        if hold:
            self._files[name] = file
        try:
            if found != size:
                raise StoreError(f"{path} has {found:,} bytes, expected {size:,}; {self._remedy}")
            yield file
        finally:
            if name not in self._files:
                file.close()


def _close(files: dict[str, BinaryIO]) -> None:
    for file in files.values():
        file.close()
