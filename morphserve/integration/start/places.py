"""Places that a server writes to: what is wrong with one of them is said, or got round, before weights load."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from morphserve.cache import VARIABLE, cache_root
from morphserve.config import MorphServeConfig
from morphserve.errors import ConfigError
from morphserve.user_input import user_path
from quant_layers import only_ours, private_directory

logger = logging.getLogger("vllm.morphserve")


def check_log(log: Path | None) -> None:
    """Refuse a decision log that could not be written; nothing is made.

    Raises:
        ConfigError: value, limit, remedy.
    """
    if log is None:
        return
    if obstacle := _obstacle(log.parent):
        raise ConfigError(f"decision_log: {log.parent}: {obstacle}. Give another.")
    if (file := user_path(log)).exists() and not (file.is_file() and os.access(file, os.W_OK)):
        raise ConfigError(f"decision_log: {log} is no file that this user can write to. Give another.")


def with_cache(config: MorphServeConfig) -> MorphServeConfig:
    """Return the settings with a cache directory that layers can be packed into; nothing is made where there is one.

    Who names none may have a home directory that cannot be written to, as in many a container: layers then go to a
    directory of this user's among the temporary files, the same at each start.

    Raises:
        ConfigError: value, limit, remedy.
    """
    obstacle = _obstacle(config.cache_dir)
    if not obstacle:
        return config
    if config.cache_dir != cache_root() or os.environ.get(VARIABLE):
        raise ConfigError(f"cache_dir: {config.cache_dir}: {obstacle}. Give another, here or as {VARIABLE}.")
    if config.prepare is not None:
        raise ConfigError(
            f"prepare: {config.prepare}: what is made must be kept, and {obstacle}. Set cache_dir, or {VARIABLE}."
        )
    place = _temporary(obstacle)
    logger.warning(
        "morphserve: %s: %s. Layers are packed into %s, and again when that is gone. Set cache_dir, or %s, to a "
        "directory that lasts.",
        config.cache_dir, obstacle, place, VARIABLE,
    )  # fmt: skip
    return config.model_copy(update={"cache_dir": place})


def _obstacle(named: Path) -> str:
    """Return why nothing can be written to a directory; '' if it is there, or can be made."""
    place = user_path(named).absolute()
    while not os.path.lexists(place):
        place = place.parent  # what is missing is made
    is_open = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return "" if is_open else f"{place} is no directory that this user can write to"


def _temporary(obstacle: str) -> Path:
    remedy = f"Set cache_dir, or {VARIABLE}, to a directory of your own."
    try:
        place = Path(tempfile.gettempdir()) / f"morphserve-{os.geteuid()}"
        private_directory(place)
    except OSError as e:
        raise ConfigError(f"cache_dir: {obstacle}, and among temporary files neither ({e}). {remedy}") from e
    # Anybody may have made something by this name.
    if place.is_symlink() or not only_ours(place) or _obstacle(place):
        raise ConfigError(f"cache_dir: {obstacle}, and {place} is another user's, or open to others. {remedy}")
    return place
