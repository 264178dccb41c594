"""`python -m morphserve check`: which seams hold on the installed vLLM."""

from __future__ import annotations

import argparse
import sys

from morphserve.version import SUPPORTED_VLLM, __version__


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when every seam holds, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m morphserve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="import every vLLM symbol MorphServe touches and compare signatures")
    parser.parse_args(argv)

    from morphserve.integration.seams import check_all

    results = check_all()
    width = max(len(r.seam.name) for r in results)
    for r in results:
        sys.stdout.write(f"{'ok  ' if r.ok else 'FAIL'} {r.seam.name:<{width}}  {r.seam.target}\n")
        sys.stdout.write(f"     {'':<{width}}  {r.detail}; {r.seam.why}\n")
    broken = sum(not r.ok for r in results)
    verdict = "all hold" if not broken else f"{broken} do NOT hold: the plugin will refuse to start"
    sys.stdout.write(f"morphserve {__version__}, vLLM {SUPPORTED_VLLM}: {len(results)} seams, {verdict}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
