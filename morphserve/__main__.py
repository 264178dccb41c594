"""`python -m morphserve check`: can MorphServe run here, in which dtype and formats. `inspect PROFILE`: what is in a
profile. `replay-log FILE`: does a decision log's policy, asked again, answer the same."""

from __future__ import annotations

import argparse
import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Run a command; exit status 0 when MorphServe can run here, the profile is sound or the log replays, else 1."""
    parser = argparse.ArgumentParser(prog="python -m morphserve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="versions, every vLLM symbol that MorphServe touches, every kernel")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    check.add_argument(
        "--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"],
        help="that a server is to have; auto = the one that serves best on this CPU",
    )  # fmt: skip
    inspect = commands.add_parser("inspect", help="print a profile as tables")
    inspect.add_argument("profile", help="directory that scripts/profile_layers.py made")
    replay = commands.add_parser("replay-log", help="ask a policy again what a decision log says it was asked")
    replay.add_argument("file", help="written with `decision_log_detail: all`")
    replay.add_argument("--policy", metavar="YAML", help="ask this file's policy instead, and show where it differs")
    args = parser.parse_args(argv)
    if args.command == "inspect":
        return _inspect(args.profile)
    if args.command == "replay-log":
        from morphserve.control import print_replay

        return print_replay(args.file, args.policy)
    # Read as torch is loaded: threads that wait in a loop would time, and slow down, whatever else has the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from morphserve.integration.offline.check import check as check_machine

    return check_machine(args.dtype, args.json)


def _inspect(directory: str) -> int:
    from morphserve.tools.profile.inspect import describe
    from quant_layers import ProfileError, read_profile

    try:
        profile = read_profile(directory)
    except ProfileError as error:
        sys.stderr.write(f"morphserve inspect: {error}\n")
        return 1
    sys.stdout.write(describe(profile))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
