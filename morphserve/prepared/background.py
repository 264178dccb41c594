"""A command that runs beside a server, in a process group of its own that ends as one."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence

_GRACE_S = 5.0  # from SIGTERM to SIGKILL
_POLL_S = 0.05
_TAIL_BYTES = 4096


class Background:
    """A command and all that it starts. What it writes goes to a file without a name, whose end can be read."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it.

        Raises:
            OSError: the system refuses.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        self._kill_at_s: float | None = None
        self._is_killed = False
        try:
            self._process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self._log.close()
            raise

    @property
    def pid(self) -> int:
        """Of the command, and of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, as `Popen` has it, once nothing of the group is left; None until then.

        What outlives the command is ended, and killed when its time is up. Nothing waits for it after that: where
        nobody reaps orphans, as in a container whose first process is the server, they count as there for ever.
        """
        code = self._process.poll()
        if code is not None and (self._is_killed or not self._signal(0)):
            return code
        if code is not None:
            self.end()
        if self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
            self._signal(signal.SIGKILL)
            self._is_killed = True
        return None

    def end(self) -> None:
        """Ask all of it to end; `poll` kills what has not after a few seconds. Only the first call counts."""
        if self._kill_at_s is None:
            self._kill_at_s = time.monotonic() + _GRACE_S
            self._signal(signal.SIGTERM)

    def end_now(self) -> None:
        """End all of it, and wait until it is gone: at most some seconds."""
        self.end()
        while self.poll() is None:
            time.sleep(_POLL_S)

    def said(self) -> list[str]:
        """Return the last lines of what it has written."""
        file = self._log.fileno()
        start = max(os.fstat(file).st_size - _TAIL_BYTES, 0)  # read so that the command's own offset stays
        text = os.pread(file, _TAIL_BYTES, start).decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()]

    def _signal(self, signum: int) -> bool:
        """Send a signal to whatever is left of the group; return whether there was anything."""
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:
            return False
        return True
