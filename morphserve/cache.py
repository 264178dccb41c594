"""Where all that MorphServe keeps between runs lies. Standard library only: asked before anything is installed."""

from __future__ import annotations

import os
from pathlib import Path

from morphserve.errors import ConfigError

VARIABLE = "MORPHSERVE_CACHE"


def cache_root() -> Path:
    """Return the directory that MORPHSERVE_CACHE names, else `~/.cache/morphserve`.

    `cache_dir` of the settings moves from there what is a server's own: packed layers and what was prepared.

    Raises:
        ConfigError: it lies in a home directory that nobody here has, as of a container's user without one.
    """
    root = os.environ.get(VARIABLE) or "~/.cache/morphserve"
    try:
        return Path(root).expanduser().absolute()
    except RuntimeError as e:
        raise ConfigError(f"{root}: nobody here has that home directory. Set {VARIABLE} to a directory.") from e
