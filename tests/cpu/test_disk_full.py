"""A disk that really refuses: beyond a limit the kernel fails every write (RLIMIT_FSIZE), wherever it happens to come.

Other tests raise the errors themselves; here the writing libraries meet them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu.small_disk import file_size

from morphserve.errors import ProfilingError
from morphserve.tools.profile.workspace import Workspace
from quant_layers import ProfileError, ProfileLevel, StoreError, VariantStore, write_profile

LIMITS = (0, 1, 100, 4096, 20_000, 60_000)  # bytes of one file; the largest one here has more, each time
BIG = torch.arange(16_384, dtype=torch.float32)


def write_a_profile(target: Path) -> None:
    scales = {0: {"mlp": BIG}}
    write_profile(target, "f", scales, [ProfileLevel({}, 0.0, 0.0, 0, 1.0)], (0,), {}, {})


def write_a_layer(target: Path) -> None:
    store = VariantStore.open(target, "f" * 64, {"w8": "kernel"})
    store.write(0, "base", {"mlp": {"weight": BIG.view(128, 128)}})


def keep_a_result(target: Path) -> None:
    Workspace(target, {"a": 1}).save("hidden", 0, BIG)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    ("write", "error", "whole"),
    [
        (write_a_profile, ProfileError, set()),
        (write_a_layer, StoreError, {"manifest.json", ".lock"}),  # the books of a store without layers
        (keep_a_result, ProfilingError, {"settings.json"}),
    ],
)
def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    tmp_path: Path, write: Callable[[Path], None], error: type[Exception], whole: set[str], limit: int
) -> None:
    """Guards: half a file that is read as a whole one at the next start, or a library's error in place of ours."""
    target = tmp_path / "target"
    with file_size(limit), pytest.raises(error):
        write(target)
    left = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert set(left) <= whole, left
    write(target)  # there is room again, and nothing in the way
