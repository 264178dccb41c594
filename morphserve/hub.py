"""Models and checkpoints: a directory, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from morphserve.errors import ConfigError
from morphserve.user_input import user_path

_FILES = ["*.safetensors", "*.json", "*.model", "*.txt"]


def find_files(source: str, what: str) -> Path:
    """Return the directory, else the hub's files of that name, from the local cache or downloaded.

    Args:
        source: directory or hub name.
        what: that is looked for, in words.

    Raises:
        ConfigError: neither.
    """
    directory = user_path(source)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise ConfigError(
            f"{what}: {source!r} is neither a directory nor a hub repository that can be had ({e}). Give either."
        ) from e


def local_files(source: str, revision: str | None = None) -> Path | None:
    """Return the directory of a model whose files are on this machine already; None = they are not.

    Args:
        source: directory or hub name.
        revision: of the hub's.
    """
    try:
        directory = user_path(source)
        if directory.is_dir():
            return directory
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, revision=revision, allow_patterns=_FILES, local_files_only=True))
    except Exception:  # whatever the hub's client makes of the name, the cache or a missing client: nothing is here
        return None
