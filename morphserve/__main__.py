"""`python -m morphserve check`: which seams hold on the installed vLLM. `inspect PROFILE`: what is in a profile."""

from __future__ import annotations

import argparse
import sys

from morphserve.version import SUPPORTED_VLLM, __version__


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when every seam holds or the profile is sound, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m morphserve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="import every vLLM symbol MorphServe touches and compare signatures")
    inspect = commands.add_parser("inspect", help="print a profile as tables")
    inspect.add_argument("profile", help="directory that scripts/profile_layers.py made")
    args = parser.parse_args(argv)
    return _inspect(args.profile) if args.command == "inspect" else _check()


def _inspect(directory: str) -> int:
    from morphserve.inspect_profile import describe
    from quant_layers import ProfileError, read_profile

    try:
        profile = read_profile(directory)
    except ProfileError as error:
        sys.stderr.write(f"morphserve inspect: {error}\n")
        return 1
    sys.stdout.write(describe(profile))
    return 0


def _check() -> int:
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
