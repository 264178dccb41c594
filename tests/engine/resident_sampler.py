"""Watches the anonymous resident memory of another process: `resident_sampler.py PID`, until stdin closes.

Reads statm (resident minus shared, about 1 us), not smaps_rollup: that one walks the page tables under the lock
which the watched process needs to map and unmap, and would slow down what it measures. Prints one JSON document:
[[seconds of the monotonic clock, bytes], ...].
"""

from __future__ import annotations

import json
import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAUSE_S = 0.0003  # leaves the core to others; a read every 0.4 ms or so

Samples = list[tuple[float, int]]  # (time.monotonic() seconds, anonymous bytes)


@contextmanager
def sampled(pid: int) -> Iterator[Samples]:
    """Watch `pid` inside the `with`; the list is filled when it ends."""
    samples: Samples = []
    script = [sys.executable, "-S", str(Path(__file__)), str(pid)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sampler:
        assert sampler.stdout is not None and sampler.stdout.readline() == "ready\n"
        try:
            yield samples
        finally:
            found, _ = sampler.communicate()  # closes its stdin
            samples.extend((at, nbytes) for at, nbytes in json.loads(found))


def main() -> None:
    statm = os.open(f"/proc/{sys.argv[1]}/statm", os.O_RDONLY)
    samples = []
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], _PAUSE_S)[0]:
        _, resident, shared, *_ = os.pread(statm, 256, 0).split()
        samples.append((time.monotonic(), (int(resident) - int(shared)) * mmap.PAGESIZE))
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
