"""The file that keeps a study, and what it must agree with to be gone on with."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, create_trial

from morphserve.tools.tune.errors import TuningError

SCHEMA = 1
_NAME = "morphserve"
_SETTINGS = "morphserve_settings"
_REMEDY = "Give another --out for a new study, or the settings of this one to go on with it."


class StudyFile:
    """The file of finished trials: Optuna's journal, which Optuna's own tools read."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open the study, or begin it.

        Raises:
            TuningError: the file is no study, or one with other settings; the message names them.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.path = path
        self._lock = _lock(path)
        try:
            _drop_torn_line(path)
            self._study = _open(path)
            self._agree({"schema": SCHEMA, **settings})
        except BaseException:
            self._lock.close()
            raise

    def _agree(self, settings: Mapping[str, Any]) -> None:
        """Record the settings of a new study, compare those of an old one."""
        recorded = self._study.user_attrs.get(_SETTINGS)
        if recorded is None and not self._study.trials:
            self._study.set_user_attr(_SETTINGS, dict(settings))
        elif different := differences(recorded or {}, settings):
            what = "\n  ".join(different)
            raise TuningError(f"{self.path} is a study with other settings:\n  {what}\n{_REMEDY}")

    @property
    def study(self) -> optuna.Study:
        """Optuna's study, to read from."""
        return self._study

    def close(self) -> None:
        """Let another run have it."""
        self._lock.close()

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, by number."""
        return self._study.get_trials(deepcopy=False)

    def add(self, trial: FrozenTrial) -> None:
        """Append a finished trial, the one after the last."""
        assert trial.number == len(self.trials())
        self._study.add_trial(
            create_trial(
                state=trial.state,
                values=trial.values,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
                system_attrs=trial.system_attrs,
            )
        )


def differences(recorded: object, wanted: object, path: str = "") -> list[str]:
    """List every value that is not the same in both, as `key: then -> now`."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        keys = [*recorded, *(key for key in wanted if key not in recorded)]
        found = []
        for key in keys:
            where = f"{path}.{key}" if path else str(key)
            found += differences(recorded.get(key, "(not there)"), wanted.get(key, "(not there)"), where)
        return found
    return [] if recorded == wanted else [f"{path}: {recorded!r} in the study, {wanted!r} now"]


def _open(path: Path) -> optuna.Study:
    """Open the study in the file, made where it is empty.

    Raises:
        TuningError: something else is in it; it stays as it is.
    """
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if not isinstance(json.loads(line).get("op_code"), int):  # Optuna itself would skip some of these
                raise ValueError(f"line {line[:40]!r} is no record")
        storage = JournalStorage(JournalFileBackend(str(path)))
        names = [study.study_name for study in storage.get_all_studies()]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as e:
        raise TuningError(f"{path} is no study that Optuna {optuna.__version__} can read ({e}). {_REMEDY}") from e
    if names and names != [_NAME]:
        raise TuningError(f"{path} holds other studies ({', '.join(names)}). {_REMEDY}")
    if names:
        return optuna.load_study(storage=storage, study_name=_NAME)
    return optuna.create_study(storage=storage, study_name=_NAME, directions=["minimize", "minimize"])


def _lock(path: Path) -> IO[bytes]:
    """Lock the study until `close`, or the process ends: two runs that add to it would number their trials alike.

    Raises:
        TuningError: another one has it, or the file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab")
    except OSError as e:
        raise TuningError(f"study {path}: {e.strerror}. Give a directory that can be written as --out.") from e
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        stream.close()
        raise TuningError(f"study {path}: another run is at work on it. Wait for it, or give another --out.") from e
    return stream


def _drop_torn_line(path: Path) -> None:
    """Drop the half line that a run leaves when it is killed while it writes: the next one would be glued to it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content.startswith(b'{"op_code"') and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)  # in place: a full disk must not cost the whole study
