"""What the engine tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def variant_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed variants of the demo model: built by the first engine, read by the others."""
    return tmp_path_factory.mktemp("variants")
