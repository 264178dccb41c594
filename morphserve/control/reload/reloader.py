"""A new `policy:` section from the edited YAML, or as it was sent to a server without one, while the server runs.

A thread looks at the file once a second, in an engine of its own process as well as in-process; the step path never
does. What it finds is read, checked and built there; the controller starts to ask the new policy at its next tick. Only
`policy`, and what the step times file of kind slo holds, may change: a file in which anything else differs from what
the server started with is refused as a whole. A refused file changes nothing.

What comes of it is told without a value of the file, which whoever asks need not be allowed to read; the log has them.

A new policy has seen nothing yet: dwell times, forecasts, the token bucket and the quality budget of kind slo start
anew. The level and the transition under way are the engine's and stay; so do the step times that kind slo has learned,
and what is left of the seconds that requests may hold others up, whatever an hour has now.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from morphserve.config import MorphServeConfig, load_config, parse_policy, step_times_file
from morphserve.control.reload.file import WatchedFiles
from morphserve.control.reload.words import Told, changes, difference, message, without_values
from morphserve.errors import ConfigError
from policies import PolicySetup

logger = logging.getLogger(__name__)

Outcome = Literal["ok", "checked", "unchanged", "refused", "busy"]


@dataclass(frozen=True, slots=True)
class Reloads:
    """The reloads so far."""

    kind: str
    source: str
    serves: str  # the policy's digest: engines of one digest serve the same
    reloads: int = 0
    refused: int = 0
    last_outcome: Outcome | None = None
    last_error: str | None = None  # None after a file that was good
    last_s: float | None = None  # when, seconds since the epoch
    note: str | None = None  # the keys that the last accepted file changed


class PolicyReloader:
    """A reader that checks an edited file and hands its policy over. One thread at a time; any may read `reloads`."""

    def __init__(
        self,
        file: Path | None,
        running: MorphServeConfig,
        setup: PolicySetup,
        *,
        setup_of: Callable[[MorphServeConfig], PolicySetup],
        build: Callable[[PolicySetup], Callable[[str], None]],
        wall_clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Read nothing yet: the first looks find what has changed since the server read the file.

        Args:
            file: the YAML; None = the settings have no file.
            running: what the server started with.
            setup: of the policy that is asked now.
            setup_of: what a config's policy is made of; may raise ConfigError.
            build: builds the policy and returns what hands it over, for a note of what has changed in words; may raise
                ConfigError.
            wall_clock: seconds since the epoch.
            pause: between two looks of a reload that is asked for.
        """
        self._file = file
        self._running = running
        self._setup = setup
        self._setup_of = setup_of
        self._build = build
        self._wall_clock = wall_clock
        self._watched = WatchedFiles(self._files, pause)
        source = "additional_config" if file is None else str(file)
        self.reloads = Reloads(setup.section.kind, source, setup.digest)

    @property
    def has_file(self) -> bool:
        """Whether there is something to watch."""
        return self._file is not None

    def look(self) -> None:
        """Take a file that has changed: once two looks agree, since an editor may be in the middle of writing it."""
        is_first = self._watched.is_new
        loaded = self._watched.changed(self._load)
        if loaded is not None and not (is_first and loaded == self._setup):
            self._take(loaded, f"{self._file} has changed")

    def reload(self, cause: str, sent: str = "", is_rehearsal: bool = False) -> dict[str, Any]:
        """Take the file once two looks at it agree; without a file, what was sent. Never raises.

        Args:
            cause: who asks, in words.
            sent: a `policy:` section in JSON or YAML; empty = none.
            is_rehearsal: only say whether it would be taken; a refusal counts.
        """
        loaded: PolicySetup | ConfigError
        if self._file is None:
            loaded = self._parse(sent)
        elif sent:
            loaded = Told("the settings are in a file: edit it, and POST without a body")
        else:
            loaded = self._watched.settled(self._load)
        if self._take(loaded, cause, is_rehearsal) and is_rehearsal:
            return {**self.answer(), "ok": True, "outcome": "checked", "error": None, "changed": None}
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return what came of the last reload, without a value of the file."""
        now = self.reloads
        return {
            "ok": now.last_outcome != "refused",
            "outcome": now.last_outcome,
            "error": now.last_error,
            "kind": now.kind,
            "serves": now.serves,
            "changed": now.note if now.last_outcome == "ok" else None,
        }

    def _files(self) -> list[Path]:
        assert self._file is not None
        times = step_times_file(self._running) if self._setup.section.kind == "slo" else None
        return [self._file] if times is None else [self._file, times.expanduser()]

    def _load(self) -> PolicySetup | ConfigError:
        """Return the file's setup, or why not."""
        assert self._file is not None
        try:
            config = load_config(self._file)
            # Formats, ladder and files were checked at start: what names them must be what it was.
            if keys := [key for key, _, _ in changes(self._running, config) if key.split(".")[0] != "policy"]:
                raise Told(
                    f"other than the server started with: {', '.join(keys)}. Only `policy` can change "
                    "while it runs: restart to change these, or put them back."
                )
            return self._setup_of(config)
        except ConfigError as e:
            return e
        except Exception as e:
            return ConfigError(message(e))

    def _parse(self, sent: str) -> PolicySetup | ConfigError:
        """Return the setup that was sent, or why not."""
        try:
            return self._setup_of(self._running.model_copy(update={"policy": parse_policy(sent, "body")}))
        except Exception as e:
            return ConfigError(message(e))

    def _take(self, loaded: PolicySetup | ConfigError, cause: str, is_rehearsal: bool = False) -> bool:
        """Hand over a policy, however it came, unless it is no other; what came of it is noted.

        Returns:
            Whether it can be served. In a rehearsal that is not noted, and nothing handed over.
        """
        if isinstance(loaded, ConfigError):
            self._refuse(loaded, cause)
            return False
        if loaded == self._setup:
            if not is_rehearsal:
                self._note("unchanged", last_error=None)
            return True
        found = dict(difference(self._setup, loaded))
        note = ", ".join(f"{key} {change}".rstrip() for key, change in found.items())
        try:
            hand_over = self._build(loaded)
            if is_rehearsal:
                return True
            hand_over(f"{cause}: {note}")
        except Exception as e:
            self._refuse(e, cause)
            return False
        self._setup = loaded
        count, note = self.reloads.reloads + 1, ", ".join(found)
        self._note("ok", kind=loaded.section.kind, serves=loaded.digest, reloads=count, last_error=None, note=note)
        return True

    def _refuse(self, error: Exception, cause: str) -> None:
        logger.error("morph: %s, but it is refused and the policy stays: %s", cause, message(error))
        told = message(error) if self._file is None else without_values(error)
        self._note("refused", refused=self.reloads.refused + 1, last_error=told)

    def _note(self, outcome: Outcome, **fields: Any) -> None:
        self.reloads = replace(self.reloads, last_outcome=outcome, last_s=self._wall_clock(), **fields)
