"""Files that others damage, and disks that are full, slow or away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from morphserve.tools.chaos.stage import FROZEN_S, Stage

_HUNG_S = 20.0  # more than a read may take (half of `rank_timeout_s`)
_AWAY_S = 10.0
_READ_MS = 20  # of each tensor, on a slow disk


async def damaged_yaml(stage: Stage) -> None:
    """Leave the YAML empty, cut, of no sense and away, and then as it was."""
    was = stage.config.read_text(encoding="utf-8")
    await stage.in_transition()
    for text in ("", was[: len(was) // 2], "policy: [", "policy: {kind: threshold, degrade_above: 7}\n", "\0" * 64):
        stage.config.write_text(text, encoding="utf-8")
        await asyncio.sleep(2.5)  # two looks must agree
    stage.config.unlink()
    await asyncio.sleep(2.5)
    stage.config.write_text(was, encoding="utf-8")
    await asyncio.sleep(2.5)


async def changed_cache(stage: Stage) -> None:
    """Flip a byte in the middle of each packed file, in place."""
    for path in _packed(stage.cache):
        _flip(path)
    await stage.in_transition()


async def cut_cache(stage: Stage) -> None:
    """Cut each packed file in the middle, in place."""
    for path in _packed(stage.cache):
        os.truncate(path, path.stat().st_size // 2)
    await stage.in_transition()


async def removed_cache(stage: Stage) -> None:
    """Take every packed file away."""
    for path in _packed(stage.cache):
        path.unlink()
    await stage.in_transition()


async def damaged_while_away(stage: Stage) -> None:
    """While layers are away, change a third of what they come back from, cut a third, remove a third; then undo it."""
    await stage.above_level_0()
    was = {path: path.read_bytes() for path in _packed(stage.cache) if ".base." in path.name}
    if not was:
        raise AssertionError(f"no file of a loaded layer under {stage.cache}: nothing was damaged")
    for i, path in enumerate(was):
        if i % 3 == 0:
            _flip(path)
        elif i % 3 == 1:
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
    await asyncio.sleep(_AWAY_S)
    for path, content in was.items():
        path.write_bytes(content)  # in place: the server may hold the file


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x55]))


def _packed(cache: Path) -> Iterator[Path]:
    return (path for path in sorted(cache.rglob("*.safetensors")) if path.is_file())


async def slow_disk(stage: Stage) -> None:
    """Have every read of a packed file take its time, for a while."""
    with stage.broken(f"slow-read {_READ_MS}"):
        await stage.met()
        await stage.in_transition()
        await asyncio.sleep(FROZEN_S)


async def hung_disk(stage: Stage) -> None:
    """Have reads of packed files not come back, for longer than one may take."""
    with stage.broken("hang-read"):
        await stage.met()
        await asyncio.sleep(_HUNG_S)
