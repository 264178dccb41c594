"""Loads csrc/opaque_linear.cpp, built once by quant_layers.kernels.native.

Without a compiler, or when the build fails, the Python op of the same name serves: slower by 2 to 3 ms a step, never
wrong.
"""

from __future__ import annotations

import logging
from pathlib import Path

from quant_layers.kernels import native

logger = logging.getLogger("vllm.morphserve")

SOURCE = Path(__file__).with_name("csrc") / "opaque_linear.cpp"


def load(cache_dir: Path) -> bool:
    """Make `torch.ops.morphserve.linear` native. False (and one warning) when that cannot be done here."""
    try:
        native.load("opaque_linear", [native.Unit(SOURCE)], cache_dir / "native")
    except Exception as e:  # no compiler, no space, a broken toolchain: each leaves the Python op
        logger.warning("morphserve: no native linear (%s); compiled steps cost 2-3 ms more", e)
        return False
    return True
