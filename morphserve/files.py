"""Files that are there whole or not at all, and files that grow line by line within a bound. Standard library only."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_GZIP_LEVEL = 1  # level 6 makes an eighth less of it, and takes three times as long
_GZIP_WINDOW = zlib.MAX_WBITS | 16  # 16: with gzip's own header and end


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` that is its caller's alone; what is there takes its place when the block ends well."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(file: Path, text: str) -> None:
    """Write so that whoever reads `file`, or kills us, sees the old text or the new one and nothing in between."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


class RotatingFile:
    """A file that text is added to, whole or not at all. Full it becomes NAME.1, that one NAME.2, and the oldest goes.

    Where the name ends in .gz, each server writes a gzip member, and what was added can be read at once.
    """

    def __init__(self, file: Path, max_bytes: int, num_files: int) -> None:
        """Open `file` to append to; directories are made.

        Args:
            file: the newest one.
            max_bytes: a file of so many is full, and grows no more.
            num_files: that there are at most.

        Raises:
            OSError: it cannot be written to.
        """
        self._file = file
        self._max_bytes = max_bytes
        self._num_older = num_files - 1
        file.parent.mkdir(parents=True, exist_ok=True)
        self._fd = _open_to_append(file)
        self._packer: zlib._Compress | None = None
        self._before = b""  # what goes before the next line
        self._start()

    def turn_page(self) -> bool:
        """Begin another file if this one is full, or was removed to make room; return whether there is nothing in it.

        Raises:
            OSError: there is no place for another file.
        """
        found = os.fstat(self._fd)
        if found.st_nlink and found.st_size < self._max_bytes:
            return found.st_size == 0
        next_fd = _open_to_append(beside := self._file.with_name(self._file.name + ".new"))
        try:
            if found.st_nlink and self._file.exists():  # else the last try got so far, and no further
                for number in range(self._num_older, 0, -1):
                    with suppress(FileNotFoundError):
                        os.replace(self._older(number - 1), self._older(number))
            os.replace(beside, self._file)
        except OSError:
            os.close(next_fd)
            raise
        self.close()
        self._fd = next_fd
        self._start()
        return True

    def append(self, text: bytes) -> None:
        """Add whole lines.

        Raises:
            OSError: they did not fit, and nothing of them stands in the file.
        """
        if self._packer is not None:
            text = self._packer.compress(text) + self._packer.flush(zlib.Z_SYNC_FLUSH)
        size = os.fstat(self._fd).st_size
        try:
            _write_all(self._fd, self._before + text)
            self._before = b""
        except OSError:
            self._before = b"" if self._packer else b"\n"  # in case that the next line fails, too
            with suppress(OSError):
                os.ftruncate(self._fd, size)
                self._before = self._end_of_line(size)
            self._packer = self._new_member()
            raise

    def close(self) -> None:
        """Close the file; a gzip member gets its end, if that finds room."""
        with suppress(OSError):
            if self._packer is not None:
                _write_all(self._fd, self._packer.flush())
        os.close(self._fd)

    def _start(self) -> None:
        self._packer = self._new_member()
        self._before = self._end_of_line(os.fstat(self._fd).st_size)

    def _new_member(self) -> zlib._Compress | None:
        return zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW) if self._file.suffix == ".gz" else None

    def _end_of_line(self, size: int) -> bytes:
        """Return what must go before the next line: a server that was killed may have left half of one."""
        torn = self._packer is None and size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        return b"\n" if torn else b""

    def _older(self, number: int) -> Path:
        return self._file.with_name(f"{self._file.name}.{number}") if number else self._file


def _open_to_append(file: Path) -> int:
    """Return a file descriptor. Raises OSError, of a pipe or a device, too: nobody could turn its pages."""
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(file))
    return descriptor


def _write_all(descriptor: int, text: bytes) -> None:
    rest = memoryview(text)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
