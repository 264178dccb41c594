"""Where do I write what I want otherwise? Writes a config with every key, its default, its bounds and what it does.

The file changes nothing until it is edited: every value in it is the default. What is edited under `policy` while a
server runs is taken without a restart. A file that exists is left alone.

With --monitoring it writes alert rules for Prometheus and a board for Grafana instead, on the server's morphserve:*
metrics.

    morphserve init
    morphserve init /etc/morphserve.yaml
    morphserve init --monitoring /etc/prometheus/morphserve
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from morphserve.errors import ConfigError
from morphserve.shipped import DEFAULT_CONFIG, MONITORING
from morphserve.tools.command import command_parser, fail, say
from morphserve.user_input import user_path


def main(argv: Sequence[str] | None = None, prog: str = "morphserve init") -> int:
    """Write the file; returns the exit status."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("file", nargs="?", type=Path, default=Path("morphserve.yaml"), help="default: %(default)s")
    parser.add_argument("--monitoring", type=Path, metavar="DIR", help="write alerts.yaml and dashboard.json there")
    args = parser.parse_args(argv)
    try:
        if args.monitoring is not None:
            return _write_monitoring(user_path(args.monitoring))
        file = user_path(args.file)
        _write_new(file, DEFAULT_CONFIG)
    except ConfigError as e:
        return fail(prog, e)
    say(f"{file} has every key with its default. Serve with it:")
    say(f"vllm serve MODEL --plugin morphserve --morphserve-config {shlex.quote(str(file))}")
    return 0


def _write_monitoring(directory: Path) -> int:
    for source in MONITORING:
        _write_new(directory / source.name, source)
    alerts, board = (directory / source.name for source in MONITORING)
    say(f"{alerts} goes into rule_files of prometheus.yml; import {board} in Grafana")
    return 0


def _write_new(file: Path, source: Path) -> None:
    """Write a file that is not there yet.

    Raises:
        ConfigError: it is there, or cannot be written.
    """
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(source.read_text(encoding="utf-8"))
    except FileExistsError as e:
        raise ConfigError(f"{file} exists and is left as it is. Give another name, or delete it.") from e
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}. Give a file in a directory that exists and can be written.") from e
