"""A new `policy:` section from the edited YAML, or as it was sent to a server without one, while the server runs.

A thread looks at the file once a second, in an engine of its own process as well as in-process; the step path never
does. What it finds is read, checked and built there; the controller starts to ask the new policy at its next tick. Only
`policy`, and what the step times file of kind slo holds, may change: a file in which anything else differs from what
the server started with is refused as a whole. A refused file changes nothing.

A new policy has seen nothing yet: dwell times, forecasts, the token bucket and the quality budget of kind slo start
anew. The level and the transition under way are the engine's and stay; so do the step times that kind slo has learned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal

from pydantic import BaseModel

from morphserve.config import MorphServeConfig, load_config, parse_policy, step_times_file
from morphserve.errors import ConfigError, MorphServeError
from policies import PolicySetup

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0

Outcome = Literal["ok", "unchanged", "refused"]
Stamp = tuple[tuple[int, int, int] | None, ...]  # (mtime_ns, size, inode) of each file; None = not there


@dataclass(frozen=True, slots=True)
class Reloads:
    """The reloads so far."""

    kind: str
    source: str
    reloads: int = 0
    refused: int = 0
    last_outcome: Outcome | None = None
    last_error: str | None = None  # None after a file that was good
    last_s: float | None = None  # when, seconds since the epoch
    note: str | None = None  # what the last accepted file changed


class PolicyReloader:
    """A reader that checks an edited file and hands its policy over. One thread at a time; any may read `reloads`."""

    def __init__(
        self,
        file: Path | None,
        running: MorphServeConfig,
        setup: PolicySetup,
        *,
        setup_of: Callable[[MorphServeConfig], PolicySetup],
        install: Callable[[PolicySetup, str], None],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Read nothing yet: the first looks find what has changed since the server read the file.

        Args:
            file: the YAML; None = the settings have no file.
            running: what the server started with.
            setup: of the policy that is asked now.
            setup_of: what a config's policy is made of; may raise ConfigError.
            install: builds the policy and hands it over, with what has changed in words; may raise ConfigError.
            wall_clock: seconds since the epoch.
        """
        self._file = file
        self._running = running
        self._setup = setup
        self._setup_of = setup_of
        self._install = install
        self._wall_clock = wall_clock
        self._seen: Stamp = ()
        self._done: Stamp = ()
        self.reloads = Reloads(setup.section.kind, "additional_config" if file is None else str(file))

    @property
    def has_file(self) -> bool:
        """Whether there is something to watch."""
        return self._file is not None

    def look(self) -> None:
        """Take a file that has changed: once two looks agree, since an editor may be in the middle of writing it."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            return
        if stamp == self._done or any(file is None or file[1] == 0 for file in stamp):
            return  # seen to; or being written: editors truncate, or move away, and then write
        loaded = self._load()
        if self._stamp() != stamp:
            return
        is_first, self._done = not self._done, stamp
        if not is_first or loaded != self._setup:
            self._take(loaded, f"{self._file} has changed")

    def reload(self, cause: str, sent: str = "") -> dict[str, Any]:
        """Take the file as it is now; without a file, what was sent. Never raises.

        Args:
            cause: who asks, in words.
            sent: a `policy:` section in JSON or YAML; empty = none.
        """
        if self._file is None:
            self._take(self._parse(sent), cause)
        elif sent:
            self._refuse(f"the settings are in {self._file}: edit the file, and POST without a body", cause)
        else:
            self._seen = self._done = self._stamp()
            self._take(self._load(), cause)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return what came of the last reload."""
        now = self.reloads
        return {
            "ok": now.last_outcome != "refused",
            "outcome": now.last_outcome,
            "error": now.last_error,
            "policy": self._setup.section.model_dump(mode="json"),
        }

    def _stamp(self) -> Stamp:
        assert self._file is not None
        files = [self._file]
        if self._setup.section.kind == "slo" and (times := step_times_file(self._running)) is not None:
            files.append(times.expanduser())
        return tuple(map(_stamp_of, files))

    def _load(self) -> PolicySetup | ConfigError:
        """Return the file's setup, or why not."""
        assert self._file is not None
        try:
            if (stamp := _stamp_of(self._file)) is not None and stamp[1] == 0:
                raise ConfigError(f"{self._file} is empty. Write it, or restart to serve with the defaults.")
            config = load_config(self._file)
            # Formats, ladder and files were checked at start: what names them must be what it was.
            if keys := [key for key, _, _ in _changes(self._running, config) if key.split(".")[0] != "policy"]:
                raise ConfigError(
                    f"{self._file}: other than the server started with: {', '.join(keys)}. Only `policy` can change "
                    "while it runs: restart to change these, or put them back."
                )
            return self._setup_of(config)
        except Exception as e:
            return ConfigError(_message(e))

    def _parse(self, sent: str) -> PolicySetup | ConfigError:
        """Return the setup that was sent, or why not."""
        try:
            return self._setup_of(self._running.model_copy(update={"policy": parse_policy(sent, "body")}))
        except Exception as e:
            return ConfigError(_message(e))

    def _take(self, loaded: PolicySetup | ConfigError, cause: str) -> None:
        if isinstance(loaded, ConfigError):
            self._refuse(str(loaded), cause)
            return
        if loaded == self._setup:
            self._note("unchanged", last_error=None)
            return
        note = _difference(self._setup, loaded)
        try:
            self._install(loaded, f"{cause}: {note}")
        except Exception as e:
            self._refuse(_message(e), cause)
            return
        self._setup = loaded
        self._note("ok", kind=loaded.section.kind, reloads=self.reloads.reloads + 1, last_error=None, note=note)

    def _refuse(self, error: str, cause: str) -> None:
        logger.error("morph: %s, but it is refused and the policy stays: %s", cause, error)
        self._note("refused", refused=self.reloads.refused + 1, last_error=error)

    def _note(self, outcome: Outcome, **fields: Any) -> None:
        self.reloads = replace(self.reloads, last_outcome=outcome, last_s=self._wall_clock(), **fields)


class ReloadWatch:
    """The thread that looks once in a while, and when it is asked to."""

    def __init__(self, reloader: PolicyReloader, interval_s: float = WATCH_INTERVAL_S) -> None:
        self._reloader = reloader
        self._interval_s = interval_s
        self._asked: Queue[tuple[str, str, Future[dict[str, Any]]] | None] = Queue()
        self._is_closed = self._has_thread = self._has_failed = False
        if reloader.has_file:
            self._start()

    @property
    def reloads(self) -> Reloads:
        """The reloads so far."""
        return self._reloader.reloads

    def ask(self, cause: str, sent: str = "") -> Future[dict[str, Any]]:
        """Have the file read now, or what was sent (see `PolicyReloader.reload`); the thread completes the future."""
        future: Future[dict[str, Any]] = Future()
        why = "the engine is shutting down" if self._is_closed else ""
        if not (why or sent or self._reloader.has_file):
            why = (
                "the settings came without a file (additional_config, or no --morphserve-config): there is none to "
                "read. POST /morphserve/reload with a `policy:` section in the body, JSON or YAML"
            )
        if why:
            future.set_result({**self._reloader.answer(), "ok": False, "outcome": "refused", "error": why})
        else:
            self._start()
            self._asked.put((cause, sent, future))
        return future

    def close(self) -> None:
        """Stop: no look comes after the one that may be under way. Re-entrant."""
        self._is_closed = True
        self._asked.put(None)

    def _start(self) -> None:
        """Start the thread: at once where there is a file, else when somebody sends a policy first."""
        if not self._has_thread:
            self._has_thread = True
            threading.Thread(target=self._loop, name="morphserve-reload", daemon=True).start()

    def _loop(self) -> None:
        while not self._is_closed:
            try:
                asked = self._asked.get(timeout=self._interval_s if self._reloader.has_file else None)
            except Empty:
                asked = None
            if asked is None:
                self._look()
                continue
            cause, sent, future = asked
            future.set_result(self._reloader.reload(cause, sent))

    def _look(self) -> None:
        if self._is_closed or not self._reloader.has_file:
            return
        try:
            self._reloader.look()
        except Exception:
            if not self._has_failed:  # whatever it is may be there at every look
                logger.exception("morph: looking for a new policy failed, the policy stays")
            self._has_failed = True


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _changes(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value before, value now) of what differs, sections taken apart where they are of one kind."""
    for name in type(old).model_fields:
        before, now = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and type(before) is type(now):
            yield from _changes(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}", before, now


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, MorphServeError) else f"{type(error).__name__}: {error}"


def _difference(old: PolicySetup, new: PolicySetup) -> str:
    """Put what differs into words."""
    if type(old.section) is not type(new.section):
        return f"policy.kind {old.section.kind} -> {new.section.kind}"
    changes = [f"{key} {before!r} -> {now!r}" for key, before, now in _changes(old.section, new.section, "policy.")]
    if old.times != new.times:
        changes.append("step times")
    return ", ".join(changes)
