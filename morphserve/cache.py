"""Where all that MorphServe keeps between runs lies. Standard library only: asked before anything is installed."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MORPHSERVE_CACHE"


def cache_root() -> Path:
    """Return the directory that MORPHSERVE_CACHE names, else `~/.cache/morphserve`.

    `cache_dir` of the settings moves from there what is a server's own: packed layers and what was prepared.
    """
    return Path(os.environ.get(VARIABLE) or "~/.cache/morphserve").expanduser().absolute()
