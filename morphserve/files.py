"""Files that are there whole or not at all. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` to write to; what was written takes its place when the block ends well."""
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:  # only then: after the move that name may be another process's
        partial.unlink(missing_ok=True)
        raise


def write_whole(file: Path, text: str) -> None:
    """Write so that whoever reads `file`, or kills us, sees the old text or the new one and nothing in between."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")
