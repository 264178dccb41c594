"""Where do I write what I want otherwise? Writes a config with every key, its default, its bounds and what it does.

The file changes nothing until it is edited: every value in it is the default. What is edited under `policy` while a
server runs is taken without a restart. A file that exists is left alone.

    morphserve init
    morphserve init /etc/morphserve.yaml
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from morphserve.errors import ConfigError
from morphserve.shipped import DEFAULT_CONFIG
from morphserve.tools.command import command_parser, fail, say
from morphserve.user_input import user_path


def main(argv: Sequence[str] | None = None, prog: str = "morphserve init") -> int:
    """Write the file; returns the exit status."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("file", nargs="?", type=Path, default=Path("morphserve.yaml"), help="default: %(default)s")
    args = parser.parse_args(argv)
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    try:
        file = user_path(args.file)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return fail(prog, f"{file} exists and is left as it is. Give another name, or delete it.")
    except ConfigError as e:
        return fail(prog, e)
    except OSError as e:
        return fail(prog, f"{file}: {e.strerror}. Give a file in a directory that exists and can be written to.")
    say(f"{file} has every key with its default. Serve with it:")
    say(f"vllm serve MODEL --plugin morphserve --morphserve-config {shlex.quote(str(file))}")
    return 0
