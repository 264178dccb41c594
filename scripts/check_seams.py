"""Would MorphServe attach to this vLLM, and what has moved since the last one? Every row of the seam tables, checked
against sources: nothing is imported.

For a vLLM that cannot run here: a CUDA wheel on a machine without a device, the next version, a checkout. The installed
vLLM without --wheel. Columns: table (all = every platform, cuda, kernels), row, ok or NO, target, what is missing. Exit
status 1 if a row of `all` or `cuda` does not hold, or the version is outside of the supported range. Last stdout line:
one JSON document.

With --compare, the rows whose targets are not what they were: table, row, what has changed (gone, signature, body) and
where; with --diff, how. Exit status 1 if one is gone.

    python scripts/check_seams.py --wheel 0.34.0
    python scripts/check_seams.py --compare 0.33.0 0.34.0 --diff

VLLM is a wheel, a directory with vllm/ in it, or a version, whose wheel (0.3 GB) is then downloaded, once, to
~/.cache/morphserve/wheels, or in MORPHSERVE_CACHE.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

from morphserve.cache import cache_root
from morphserve.errors import SeamError
from morphserve.integration.seams import (
    CUDA_KERNEL_SEAMS,
    CUDA_SEAMS,
    SEAMS,
    SeamResult,
    SourceTree,
    check_sources,
    check_sources_version,
    compare,
    sources_version,
)
from morphserve.tools.command import command_parser, finish, say
from morphserve.version import SUPPORTED_VLLM

TABLES = {"all": SEAMS, "cuda": CUDA_SEAMS, "kernels": CUDA_KERNEL_SEAMS}
WHEELS = cache_root() / "wheels"
_REQUIRED = ("all", "cuda")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--wheel", metavar="VLLM", help="check this one")
    parser.add_argument("--compare", nargs=2, metavar="VLLM", help="say what has moved between two")
    parser.add_argument("--diff", action="store_true", help="with --compare: print the lines that changed")
    args = parser.parse_args(argv)
    try:
        if args.compare:
            return report(*map(locate, args.compare), diff=args.diff)
        return check(locate(args.wheel) if args.wheel else installed())
    except SeamError as e:
        parser.error(str(e))


def check(path: Path | None) -> int:
    """Print whether the rows hold in one vLLM; the exit status.

    Raises:
        SeamError: there is none.
    """
    if path is None:
        raise SeamError("vLLM is not installed here; give --wheel VLLM")
    tree = SourceTree(path)
    results = {table: check_sources(rows, tree) for table, rows in TABLES.items()}
    results["all"].insert(0, check_sources_version(tree))
    for table, of_table in results.items():
        for r in of_table:
            say(f"{table:<8} {r.seam.name:<22} {'ok' if r.ok else 'NO':<3} {r.seam.target}  {r.detail}")
    found = document(path, sources_version(tree), results)
    finish(found)
    return 0 if found["ok"] else 1


def report(before: Path, after: Path, diff: bool) -> int:
    """Print what has moved between two vLLMs; the exit status."""
    trees = SourceTree(before), SourceTree(after)
    moves = [(table, move) for table, rows in TABLES.items() for move in compare(rows, *trees)]
    moved = [(table, move) for table, move in moves if move.kind != "same"]
    for table, move in moved:
        say(f"{table:<8} {move.seam.name:<22} {move.kind:<10} {move.detail}")
    for _, move in moved if diff else ():
        say(f"\n{move.diff}")
    found = {
        "before": sources_version(trees[0]),
        "after": sources_version(trees[1]),
        "num_rows": Counter(move.kind for _, move in moves),
        "moved": [{"table": t, "name": m.seam.name, "kind": m.kind, "detail": m.detail} for t, m in moved],
    }
    finish(found)
    return 1 if found["num_rows"]["gone"] else 0


def locate(vllm: str) -> Path:
    """Return the wheel or directory that is meant; of a version, the wheel, which is there afterwards.

    Raises:
        SeamError: it cannot be downloaded.
    """
    if not vllm.replace(".", "").isalnum() or not vllm[0].isdigit() or Path(vllm).exists():
        return Path(vllm)
    here = installed()
    if here is not None and importlib.metadata.version("vllm").partition("+")[0] == vllm:
        return here
    directory = WHEELS
    if not (wheels := list(directory.glob(f"vllm-{vllm}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "-d", str(directory), f"vllm=={vllm}"], capture_output=True, text=True)
        wheels = list(directory.glob(f"vllm-{vllm}-*.whl"))
        if not wheels:
            raise SeamError(f"vLLM {vllm} cannot be downloaded: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return wheels[0]


def installed() -> Path | None:
    """Return the directory that holds the installed vLLM, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def document(path: Path, version: str | None, results: dict[str, list[SeamResult]]) -> dict[str, object]:
    """Return the last line of stdout."""
    return {
        "source": str(path),
        "vllm": version,
        "supported_vllm": SUPPORTED_VLLM,
        "ok": all(r.ok for table in _REQUIRED for r in results[table]),
        "num_rows": sum(map(len, results.values())),
        "seams": [
            {"table": table, "name": r.seam.name, "target": r.seam.target, "holds": r.ok, "detail": r.detail,
             "why": r.seam.why}
            for table, of_table in results.items()
            for r in of_table
        ],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
