"""The process of one part: `python -m morphserve.tools.gpucheck.child MODULE --file FILE --device cuda --budget 30`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from morphserve.tools.gpucheck.bench import Bench, run_part


def main(argv: list[str] | None = None) -> int:
    """Return 0 when the part came to its end, whatever it found; 1 when it raised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--file", type=Path, required=True, help="findings, replaced as a whole each time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--budget", type=float, required=True, help="seconds")
    parser.add_argument("--cut", action="store_true", help="the budget is less than the part's own")
    args = parser.parse_args(argv)
    if args.dry:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # asked for once, when Triton is imported
    findings = run_part(args.module, Bench(args.device, args.dry, args.budget, args.file, is_cut=args.cut))
    sys.stdout.flush()
    return 1 if findings.error else 0


if __name__ == "__main__":
    # Not through the interpreter's end: threads and destructors of a driver in trouble hang there.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
