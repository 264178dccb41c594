"""JSON objects from files that somebody else may have damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quant_layers.errors import QuantError


def read_object(path: Path, error: type[QuantError], remedy: str) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: of the file.
        error: what to raise.
        remedy: what the user can do about it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise error(f"{path}: {e.strerror}; {remedy}") from e
    except (ValueError, RecursionError) as e:
        raise error(f"{path} is no JSON ({e}); {remedy}") from e
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}, expected an object; {remedy}")
    return found
