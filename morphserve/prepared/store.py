"""The directory of what was prepared: `CACHE_DIR/prepared/WEIGHTS/`, and the same beside this file, in the package.

    profile-KEY/       a profile, see quant_layers/sources/profile.py
    times-KEY.json     step times, see policies/step_times.py, with where they were taken and a hash of it all
    w4-awq/            a checkpoint that levels were measured with

An entry appears in one rename and never changes: what a server has found stays as it was found.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from morphserve.errors import MorphServeError
from morphserve.files import write_whole
from morphserve.prepared.entries import ProfileKey, StoredProfile, StoredTimes, TimesKey
from morphserve.prepared.place import Place

SHIPPED = Path(__file__).with_name("shipped")
_KEY = "prepared"
_SHA = "sha256"
_NAME_DIGITS = 16  # of the weights' fingerprint; the rest stands in each entry


class _Dated(Protocol):
    @property
    def when(self) -> str: ...


Entry = TypeVar("Entry", bound=_Dated)


class Store:
    """Entries of one model. What cannot be read is reported in `problems`, and is as if it was not there."""

    def __init__(self, cache_dir: Path, weights: str, shipped: Path = SHIPPED) -> None:
        """Read nothing yet.

        Args:
            cache_dir: of the settings.
            weights: see `weights_fingerprint`.
            shipped: what comes with the package.
        """
        name = weights[:_NAME_DIGITS]
        self.weights = weights
        self.directory = cache_dir.expanduser() / "prepared" / name
        self.problems: list[str] = []
        self._places = (self.directory, shipped / name)

    def profile_at(self, key: ProfileKey) -> Path:
        """Return where a profile goes."""
        return self.directory / f"profile-{key.name}"

    def times_at(self, key: TimesKey) -> Path:
        """Return where step times go."""
        return self.directory / f"times-{key.name}.json"

    def profiles(self) -> list[StoredProfile]:
        """Return all profiles of this model, verified."""
        return [found for path in self._entries("profile-*") if (found := self._read_profile(path)) is not None]

    def times(self) -> list[StoredTimes]:
        """Return all step times of this model, verified."""
        return [found for path in self._entries("times-*.json") if (found := self._read_times(path)) is not None]

    def keep_times(self, document: Mapping[str, Any], place: Place, when: str) -> Path:
        """Store what a calibration wrote.

        Raises:
            MorphServeError: the disk refuses.
        """
        from quant_layers import private_directory  # torch: only where something is made

        file = self.times_at(TimesKey(place))
        entry = {**document, _KEY: {"weights": self.weights, "place": asdict(place), "when": when}}
        try:
            private_directory(file.parent)
            write_whole(file, json.dumps(sealed(entry), indent=1) + "\n")
        except OSError as e:
            raise MorphServeError(f"{file}: {e.strerror}. Give a cache_dir that can be written.") from e
        return file

    def _entries(self, pattern: str) -> Iterator[Path]:
        for place in self._places:
            try:
                yield from sorted(path for path in place.glob(pattern) if path.suffix in ("", ".json"))
            except OSError as e:
                self.problems.append(f"{place}: {e.strerror}")

    def _read_profile(self, path: Path) -> StoredProfile | None:
        from quant_layers import ProfileError, read_profile  # torch: only where there is a profile

        try:
            profile = read_profile(path)  # with its scales: a worker must not be the first who finds them damaged
            made = profile.made
            key = ProfileKey(tuple(made["formats"]), made["dtype"], made["tier"], dict(made["sources"]))
            return StoredProfile(path, key, made, profile.num_layers) if made["weights"] == self.weights else None
        except (ProfileError, OSError, KeyError, TypeError, ValueError) as e:
            self.problems.append(_damage(path, e))
            return None

    def _read_times(self, path: Path) -> StoredTimes | None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if sealed(document)[_SHA] != document.get(_SHA):
                raise ValueError("its content was changed")
            row = document[_KEY]
            found = StoredTimes(path, Place(**row["place"]), tuple(document["formats"]), row["when"])
            return found if row["weights"] == self.weights else None
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
            self.problems.append(_damage(path, e))
            return None


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with the hash of all else in it."""
    rest = {key: value for key, value in document.items() if key != _SHA}
    return {**rest, _SHA: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def moment() -> str:
    """Return when an entry is made: to the second, because several may be made on one day, and the last one counts."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def newest(found: Sequence[Entry]) -> Entry | None:
    """Return the one that was made last; None of none."""
    return max(found, key=lambda entry: entry.when, default=None)


def _damage(path: Path, error: Exception) -> str:
    why = error.strerror if isinstance(error, OSError) else f"lacks {error}" if isinstance(error, KeyError) else error
    return str(why) if os.fspath(path) in str(why) else f"{path}: {why}"
