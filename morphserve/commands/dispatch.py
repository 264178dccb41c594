"""Runs a command of the table. Standard library only, so that `morphserve --help` loads neither torch nor vLLM."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from morphserve.commands.table import COMMANDS, Command
from morphserve.version import __version__

_INTERRUPTED = 130  # as a shell says it of SIGINT
_EPILOG = """\
exit status:
  0 fine; 1 failed, with one line on stderr; 2 wrong usage; 130 interrupted; others stand in a command's own --help

example:
  morphserve demo
  vllm serve MODEL --plugin morphserve
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in _BY_NAME:
        words = [_parser().parse_args(words).command]  # ends with --help, --version, or what is wrong
    return run(_BY_NAME[words[0]], words[1:])


def run(command: Command, words: Sequence[str]) -> int:
    """Load the command's module and let it read its words."""
    from morphserve.errors import MorphServeError
    from morphserve.setup import complete_vllm
    from morphserve.tools.command import end_as_interrupted

    try:
        end_as_interrupted()
        if said := complete_vllm():
            sys.stderr.write(f"{command.prog}: {said}\n")
        status: int = importlib.import_module(f"morphserve.{command.module}").main(words, command.prog)
    except ModuleNotFoundError as e:
        sys.stderr.write(f"{command.prog}: {_remedy(command, e)}\n")
        return 1
    except MorphServeError as e:
        from morphserve.tools.command import fail

        return fail(command.prog, e)
    except KeyboardInterrupt:
        sys.stderr.write(f"{command.prog}: interrupted\n")
        return _INTERRUPTED
    return status


def _remedy(command: Command, error: ModuleNotFoundError) -> str:
    """Say what to install.

    Raises:
        ModuleNotFoundError: it is a module of ours, or one that no extra would bring.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("torch", "vllm"):
        what = '"morphserve[cpu]", or "morphserve[cuda]" where an NVIDIA GPU is'
    elif command.extra and package not in _OURS:
        what = f'"morphserve[{command.extra}]"'
    else:
        raise error
    return f"{package} is not installed. Install what this command needs: pip install {what}"


def _parser() -> argparse.ArgumentParser:
    width = max(len(name) for name in _BY_NAME)
    rows = "\n".join(f"  {command.name:<{width}}  {command.help}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="morphserve",
        usage="morphserve COMMAND [--help | arguments]",
        description="Under load, a vLLM server swaps decoder layers for quantized ones, and gives the bytes to the KV "
        f"cache.\n\ncommands:\n{rows}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_BY_NAME, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"morphserve {__version__}")
    return parser


_BY_NAME = {command.name: command for command in COMMANDS}
_OURS = ("morphserve", "quant_layers", "kv_resize", "policies")
