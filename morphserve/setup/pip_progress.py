"""What a long `pip install` is doing, in a few lines: what is large, how many packages, how far on disk; why it failed.

Used by bootstrap.py; standard library only. pip's whole output goes to the log, as it comes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

GIB = 1024**3
BEAT_S = 15.0  # silence after which a sign of life is due
_LARGE_BYTES = 20e6  # a package of this size is named
_DOWNLOADING = "downloading"
_UNITS = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_FILE = re.compile(
    r"\s*(Downloading|Using cached|Processing) (\S+\.(?:whl|tar\.gz))(?: \(([\d.]+) ([kKMG]?B)\))?(?: \(from .*)?\s*$"
)
_INTERRUPT_GRACE_S = 10.0


class PipProgress:
    """Digests pip's output line by line."""

    def __init__(self) -> None:
        self.num_files = 0
        self.num_bytes = 0.0  # of the files whose size pip has told, cached ones included
        self.phase = "looking up what is needed"

    def feed(self, line: str) -> str | None:
        """Return what a user should read of this line; None for most."""
        if match := _FILE.match(line):
            return self._file(match[1], match[2], float(match[3] or 0) * _UNITS[match[4] or "B"])
        if line.startswith("Installing collected packages:"):
            count = line.count(",") + 1
            self.phase = f"unpacking {count} packages"
            return self.phase + self._size()
        return None

    def beat(self, seconds: float, bytes_on_disk: int) -> str:
        """Return a sign of life."""
        fetched = f", {self.num_files} packages so far{self._size()}" if self.phase == _DOWNLOADING else ""
        return f"{self.phase}{fetched}, {bytes_on_disk / GIB:.1f} GiB on disk after {seconds:.0f} s"

    def _file(self, verb: str, url: str, num_bytes: float) -> str | None:
        if not num_bytes and Path(url).is_file():
            num_bytes = Path(url).stat().st_size  # from a directory of wheels
        self.num_files += 1
        self.num_bytes += num_bytes
        self.phase = _DOWNLOADING
        if num_bytes < _LARGE_BYTES:
            return None
        name, version = (url.rsplit("/", 1)[-1].replace("%2B", "+").split("-") + [""])[:2]
        words = {"Downloading": "downloading", "Using cached": "downloaded before:"}.get(verb, "taking")
        return f"{words} {name} {version} ({num_bytes / 1e6:.0f} MB)"

    def _size(self) -> str:
        return f" ({self.num_bytes / 1e6:,.0f} MB)" if self.num_bytes else ""


def size_on_disk(directory: Path) -> int:
    """Bytes that the files below a directory take; those that vanish meanwhile count nothing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def run_showing(
    command: list[str], log: Path, venv: Path, say: Callable[[str], None], keep_open: Iterable[int] = ()
) -> tuple[int, str]:
    """Run pip and tell what it does; its exit status and its whole output, which is also in `log` at any moment.

    Args:
        command: pip install.
        log: written line by line, so that an interrupted set-up leaves it, too.
        venv: whose growth is told.
        say: takes a line for the user.
        keep_open: file descriptors that the child shall hold, too.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env={**os.environ, "PYTHONUNBUFFERED": "1"}, pass_fds=tuple(keep_open),
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    progress, output = PipProgress(), []
    begin = said = time.monotonic()
    try:
        with log.open("w", encoding="utf-8") as stream:
            while True:
                line_out = None
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=max(said + BEAT_S - time.monotonic(), 0.01))
                    if line is None:
                        break
                    output.append(line)
                    stream.write(line)
                    stream.flush()
                    line_out = progress.feed(line)
                if line_out is None and time.monotonic() - said >= BEAT_S:
                    line_out = progress.beat(time.monotonic() - begin, size_on_disk(venv))
                if line_out is not None:
                    say(line_out)
                    said = time.monotonic()
        reader.join()
        return process.wait(), "".join(output)
    except BaseException:  # Ctrl-C has reached pip, too; a full disk has not
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_INTERRUPT_GRACE_S)
        process.kill()
        process.wait()
        reader.join(_INTERRUPT_GRACE_S)
        raise


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


_NETWORK = re.compile(
    r"name resolution|Name or service not known|nodename nor servname|NewConnectionError|ConnectTimeout|"
    r"Network is unreachable|Connection (refused|reset|aborted)|Max retries exceeded|ReadTimeout|"
    r"Read timed out|ProxyError|SSLError|Could not fetch URL|No route to host"
)
_NO_TORCH = re.compile(r"No matching distribution found for torch==|find a version .* requirement torch==")


def explain_pip_failure(output: str, what: str, log: Path, torch_index: str = "") -> str:
    """Make one message out of pip's output: what failed, the line that says why, the remedy."""
    errors = [line.strip() for line in output.splitlines() if re.match(r"\W*(ERROR|error):", line)]
    # pip wraps the failure of a build step in this line; the reason follows it.
    errors = [line for line in errors if not line.endswith("error: subprocess-exited-with-error")]
    said = errors[0] if errors else (output.strip().splitlines() or ["(pip said nothing)"])[-1].strip()
    if "No space left on device" in output:
        cause, remedy = "the disk is full", "Free some space (also where TMPDIR points), then run again."
    elif _NETWORK.search(output):
        cause = "the package index could not be reached"
        remedy = (
            "Check the network; behind a proxy set HTTPS_PROXY, with a mirror set PIP_INDEX_URL. "
            "Then run again: what is already installed is kept."
        )
    elif _NO_TORCH.search(output):
        cause = "the package index has no CPU build of torch that vLLM accepts"
        remedy = (
            f"TORCH_INDEX={torch_index} has none either: give the index that holds the version named above."
            if torch_index
            else "Run again and set TORCH_INDEX=<url of PyTorch's CPU wheel index>."
        )
    else:
        cause, remedy = "pip failed", "Read the log, remove the cause, then run again."
    return f"{what}: {cause}.\n  pip said: {said}\n  {remedy}\n  Log: {log}"
