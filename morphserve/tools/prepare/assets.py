"""What comes along: text to calibrate with, and the command that quantizes to 4 bits."""

from __future__ import annotations

import sys
from pathlib import Path

_SCRIPTS = Path(__file__).parents[3] / "scripts"


def calibration_text() -> Path:
    """Return a file of English prose, a part of WikiText-2."""
    return _SCRIPTS / "corpus" / "wikitext2.txt"


def quantize_command() -> list[str]:
    """Return the first words of the command that makes an AWQ or GPTQ checkpoint."""
    return [sys.executable, str(_SCRIPTS / "quantize.py")]
