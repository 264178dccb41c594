"""Would MorphServe attach to this vLLM? Every row of the seam tables, checked against sources: nothing is imported.

For a vLLM that cannot run here: a CUDA wheel on a machine without a device, the next version, a checkout. The installed
vLLM without --wheel. Columns: table (all = every platform, cuda, kernels), row, ok or NO, target, what is missing. Exit
status 1 if a row of `all` or `cuda` does not hold, or the version is outside of the supported range. Last stdout line:
one JSON document.

    python -m pip download --no-deps --only-binary=:all: -d wheels vllm==0.33.0
    python scripts/check_seams.py --wheel wheels/vllm-0.33.0-*.whl
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from morphserve.errors import SeamError
from morphserve.integration.seams import (
    CUDA_KERNEL_SEAMS,
    CUDA_SEAMS,
    SEAMS,
    SeamResult,
    SourceTree,
    check_sources,
    check_sources_version,
    sources_version,
)
from morphserve.tools.command import command_parser, say
from morphserve.version import SUPPORTED_VLLM

TABLES = {"all": SEAMS, "cuda": CUDA_SEAMS, "kernels": CUDA_KERNEL_SEAMS}
_REQUIRED = ("all", "cuda")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--wheel", type=Path, metavar="FILE_OR_DIR", help="a wheel, or a directory with vllm/ in it")
    args = parser.parse_args(argv)
    path = args.wheel or installed()
    if path is None:
        parser.error("vLLM is not installed here; give --wheel FILE_OR_DIR")
    try:
        tree = SourceTree(path)
    except SeamError as e:
        parser.error(str(e))
    version = check_sources_version(tree)
    results = {"all": [version], "cuda": [], "kernels": []}
    for table, rows in TABLES.items():
        results[table] += check_sources(rows, tree)
    for table, of_table in results.items():
        for r in of_table:
            say(f"{table:<8} {r.seam.name:<22} {'ok' if r.ok else 'NO':<3} {r.seam.target}  {r.detail}")
    say(json.dumps(document(path, sources_version(tree), results)))
    return 0 if all(r.ok for table in _REQUIRED for r in results[table]) else 1


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
