"""One `vllm serve` process: started, waited for, and gone when the block ends."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from morphserve.endings import cause_in, how_it_ended, one_line, sentence
from morphserve.tools.children import with_us
from morphserve.tools.options import as_flag, option
from morphserve.tools.sim import ServerSpec
from morphserve.tools.watch import open_url
from morphserve.tools.workload import ReplayError

log = logging.getLogger(__name__)

LEFT_TO_VLLM = ("max_num_batched_tokens", "max_num_queued_tokens", "async_scheduling")  # unless they are given
_STOP_GRACE_S = 20.0
_DEATH_GRACE_S = 15.0  # vLLM's API process looks every 5 s whether its engine lives
_LAST_LINE_CHARS = 300


@dataclass(frozen=True, slots=True)
class ServerOptions(ServerSpec):
    """What all servers that are started for a comparison have in common."""

    model: str = option("model to serve, and whose tokenizer makes the prompts", default="", unset=True, metavar="DIR")
    served_model_name: str = option("name in the API", default="demo")
    dtype: str | None = None  # None = the model's own
    enforce_eager: bool = option("no torch.compile: starts faster, runs slower, in all runs", default=False)
    # The client needs a core of its own.
    cpu_bind: str = option("cores of the engine (VLLM_CPU_OMP_THREADS_BIND)", default="0", metavar="CORES")
    start_timeout_s: float = option(default=600.0, flag="--start-timeout", metavar="S")
    extra_args: tuple[str, ...] = option(
        "one more argument of vllm serve; repeatable", default=(), flag="--serve-arg", action="append", metavar="ARG"
    )
    command: tuple[str, ...] = field(default_factory=lambda: (*_vllm(), "serve"))

    def arguments(self, port: int, own: tuple[str, ...]) -> list[str]:
        """Return the command line of one server; `own` is what sets it apart from the others."""
        args = [
            *self.command, self.model,
            "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", self.served_model_name,
            "--max-model-len", str(self.max_model_len),
            "--max-num-seqs", str(self.max_num_seqs),
            "--block-size", str(self.block_size),
            "--disable-uvicorn-access-log",  # two lines per poll would bury what the log is read for
            "--enable-prefix-caching" if self.prefix_caching else "--no-enable-prefix-caching",
        ]  # fmt: skip
        if self.num_blocks:
            args += ["--num-gpu-blocks-override", str(self.num_blocks)]
        if self.dtype is not None:
            args += ["--dtype", self.dtype]
        if self.enforce_eager:
            args.append("--enforce-eager")
        return [*args, *self.extra_args, *self._where_given(), *own]

    def _where_given(self) -> list[str]:
        """Return the settings that are left to vLLM, where they are not as we have them by default."""
        args = []
        for each in fields(ServerSpec):
            value = getattr(self, each.name)
            if each.name in LEFT_TO_VLLM and value != each.default:
                args += [as_flag(each.name), *([] if value is True else [str(value)])]
        return args

    def environment(self) -> dict[str, str]:
        """Return the servers' environment: ours, offline, on its own cores."""
        return os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_CPU_OMP_THREADS_BIND": self.cpu_bind,
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",  # a crash must not take the log's tail with it
        }


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers."""

    url: str
    pid: int | None = None  # None: somebody else started it
    command: str = ""
    start_s: float = 0.0

    @property
    def setup(self) -> dict[str, Any]:
        """How to have it again, recorded with every run on it."""
        if self.pid is None:
            return {"url": self.url}
        return {"command": self.command, "server_start_s": round(self.start_s, 1)}


def _vllm() -> tuple[str, ...]:
    """Return vLLM's command beside this Python; where none is (vLLM lies on PYTHONPATH), the module that it runs."""
    script = Path(sys.executable).parent / "vllm"
    return (str(script),) if script.exists() else (sys.executable, "-m", "vllm.entrypoints.cli.main")


@contextlib.contextmanager
def serve(
    options: ServerOptions,
    log_path: Path,
    own_args: tuple[str, ...] = (),
    on_wait: Callable[[float], None] = lambda _: None,
) -> Iterator[Server]:
    """Start a server, yield it once /health answers, and end its whole process group.

    Args:
        log_path: the server's stdout and stderr.
        on_wait: called about twice a second with the seconds waited.

    Raises:
        ReplayError: it cannot be started, dies, or is not up within `start_timeout_s`.
    """
    port = free_port()
    args = options.arguments(port, own_args)
    command = shlex.join(args)
    log.debug("starting: %s", command)
    with log_path.open("w", encoding="utf-8") as stream:
        stream.write(f"$ {command}\n")
        stream.flush()
        try:
            # A session of its own: Ctrl-C reaches us alone, and one signal reaches all of its children.
            process = subprocess.Popen(
                args, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                env=options.environment(), start_new_session=True, preexec_fn=with_us(),
            )  # fmt: skip
        except OSError as e:
            raise ReplayError(
                f"{args[0]}: {e.strerror}. Install vLLM beside this Python: pip install \"morphserve[cpu]\"."
            ) from e
        try:
            url = f"http://127.0.0.1:{port}"
            took = _wait_healthy(process, url, options.start_timeout_s, log_path, on_wait)
            with _death_explained(process, url, log_path):
                yield Server(url=url, pid=process.pid, command=command, start_s=took)
        finally:
            stop(process)


@contextlib.contextmanager
def _death_explained(process: subprocess.Popen[bytes], url: str, log_path: Path) -> Iterator[None]:
    """Say why a server died in the block, not what its clients made of it."""
    try:
        yield
    except Exception as e:
        if process.poll() is None:
            if _healthy(url):
                raise
            # Its engine is gone: the process itself follows when it has noticed.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_DEATH_GRACE_S)
        raise ReplayError(ending(log_path, process.poll(), "the server died in the run")) from e


def ending(log_path: Path, code: int | None, what: str) -> str:
    """Say why a server ended: the cause out of its log, the remedy, and the log's path, in one line.

    Args:
        log_path: stdout and stderr of all of its processes.
        code: exit status; negative: the signal. None = it still runs.
        what: happened, as seen from outside.
    """
    try:
        cause = cause_in(log_path.read_text(encoding="utf-8", errors="replace"))
    except OSError as e:
        cause = f"its log cannot be read ({e.strerror})"
    if cause is None:
        by_itself = code is not None and 0 <= code <= 128
        cause = f"{_last_line(log_path)} (exit code {code})" if by_itself else how_it_ended(code)
    return sentence(f"{what}: {cause}", f"Log: {log_path.resolve()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process group: ask, wait, then insist."""
    for signum, grace_s in ((signal.SIGTERM, _STOP_GRACE_S), (signal.SIGKILL, 10.0)):
        if not _signal_group(process.pid, signum):
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
            # The parent is gone; its workers get the same signal unless they have left with it.
            deadline = time.monotonic() + 5.0
            while _signal_group(process.pid, 0) and time.monotonic() < deadline:
                time.sleep(0.1)
    process.wait(10.0)


def _signal_group(pgid: int, signum: int) -> bool:
    """Signal a group; False if nobody is left in it."""
    try:
        os.killpg(pgid, signum)
    except ProcessLookupError:
        return False
    return True


def _wait_healthy(
    process: subprocess.Popen[bytes],
    url: str,
    timeout_s: float,
    log_path: Path,
    on_wait: Callable[[float], None],
) -> float:
    begin = time.monotonic()
    while True:
        waited = time.monotonic() - begin
        if (code := process.poll()) is not None:
            raise ReplayError(ending(log_path, code, "the server did not start"))
        if _healthy(url):
            return waited
        if waited > timeout_s:
            raise ReplayError(
                f"the server was not up after {waited:.0f} s, limit {timeout_s:g}; raise it with --start-timeout. "
                f"It said last: {_last_line(log_path)}. Log: {log_path.resolve()}"
            )
        on_wait(waited)
        time.sleep(0.5)


def _healthy(url: str) -> bool:
    try:
        with open_url(f"{url}/health", 5.0) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _last_line(log_path: Path) -> str:
    """Return what a log said last that names no cause."""
    try:
        lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = next((line.strip() for line in reversed(lines[1:]) if line.strip()), "")  # the first is the command
    return one_line(said)[:_LAST_LINE_CHARS] or "it said nothing"


def free_port() -> int:
    """Find a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
