"""`morphserve prepare`, as the child of an idle server: it takes what nobody else wants, and is the first to go.

    python -m morphserve.tools.prepare.beside_server PID_OF_SERVER MODEL [options of `morphserve prepare`]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from morphserve.errors import ProfilingError
from morphserve.tools.apart import add_parallel_options
from morphserve.tools.children import end_with
from morphserve.tools.command import fail

_PROG = "morphserve prepare"
_FIRST_VICTIM = "1000"  # of the kernel's, when memory runs out
_RANK_BYTES = 3 << 29  # that a process with torch and vLLM has, beside weights


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, as long as the server lives; exit status as of the command, 75 where another process prepares."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser()
    parser.add_argument("server", type=int)
    parser.add_argument("model")
    add_parallel_options(parser)
    args, _ = parser.parse_known_args(words)
    live_with(args.server)
    give_way()
    from morphserve.prepared import TAKEN, TakenError, take_host
    from morphserve.tools.prepare.cli import main as prepare

    try:
        with take_host():
            check_memory(Path(args.model), args.tensor_parallel_size * args.pipeline_parallel_size)
            return prepare(words[1:], _PROG)
    except TakenError as e:
        fail(_PROG, e)
        return TAKEN
    except (ProfilingError, OSError) as e:
        return fail(_PROG, e)
    except KeyboardInterrupt:
        return 130


def live_with(server: int) -> None:
    """End on SIGTERM as on Ctrl-C, so that what this process has started ends too; have it sent if the server dies."""
    signal.signal(signal.SIGTERM, _terminated)
    end_with(server)


def give_way() -> None:
    """Take processor and disk only where nobody else wants them, and be the first to go where memory runs out.

    What this process starts inherits it.
    """
    os.nice(19)
    with suppress(OSError):  # forbidden in some containers
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_VICTIM, encoding="ascii")


def check_memory(model: Path, num_ranks: int) -> None:
    """Refuse to load a model for which there is no room beside its server.

    Raises:
        ProfilingError: what it takes, and what there is.
    """
    from kv_resize import available_bytes

    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    needed = 2 * weights + (1 + num_ranks) * _RANK_BYTES  # as loaded, and packed
    free = available_bytes()
    if free is not None and free < needed:
        raise ProfilingError(
            f"beside its server this model takes up to {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are "
            f"free. Free some, or run `morphserve prepare {model}` while the server is down."
        )


def _terminated(signum: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the way out is not to be interrupted
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
