"""What becomes of users' answers when something breaks beside them: faults from outside, on a real server under load.

`scenarios` is the table: a row each, with its fault out of `faults` (signals, files, clients, limits; `libraries` has
a C library that fails on demand). `load` sends a square wave of requests and two canaries, `processes` finds what a
server consists of, `judge` holds what was seen against what must hold, `run` brings scenarios and servers together,
`cli` is the command.
"""

from morphserve.tools.chaos.cli import main
from morphserve.tools.chaos.processes import CORE, WORKER, command_lines, has_ended

__all__ = ["CORE", "WORKER", "command_lines", "has_ended", "main"]
