"""Runs in turn, on a backend that is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cpu.test_replay_compare import QUIET, comparison, made_up

from morphserve.tools.bench.report.results import Observed
from morphserve.tools.bench.runner import Turn, run_all, run_turns, turns
from morphserve.tools.workload import ReplayError

pytestmark = pytest.mark.cpu


class FakeBackend:
    """Implements `Backend`; remembers what was kept when each run began."""

    def __init__(self, out: Path, dies_at: int = 99) -> None:
        self._out = out
        self._dies_at = dies_at
        self.kept: list[list[str]] = []
        self.waits: list[float] = []

    def run(self, turn: Turn) -> Observed:
        if len(self.kept) == self._dies_at:
            raise ReplayError("gone")
        self.kept.append(sorted(file.parent.name for file in self._out.glob("**/result.json")))
        self.waits.append(turn.measurement.restore_wait_s)
        run = made_up(turn.name, 0.1, None, None, 0.0)
        return Observed(run.replayed, run.series, run.status, {"command": f"serve {turn.name}", "seed": 7})


def test_every_run_is_kept_before_the_next_one_begins(tmp_path: Path) -> None:
    """Guards: an hour of runs that is lost with the last of them, and a result without its circumstances."""
    asked = replace(comparison(tmp_path, "stock", "static_w8"), setup={"seed": 1, "model": "tiny"})
    backend = FakeBackend(tmp_path)
    results = run_all(asked, backend, QUIET)
    assert backend.kept == [[], ["stock"]]
    assert [(r.name, r.slo, r.directory) for r in results] == [
        (name, asked.measurement.slo, tmp_path / "out" / name) for name in ("stock", "static_w8")
    ]
    assert {key: results[0].setup[key] for key in ("command", "model", "seed")} == {
        "command": "serve stock", "model": "tiny", "seed": 7,
    }  # fmt: skip
    assert "cores" in results[0].setup
    assert backend.waits == [asked.measurement.restore_wait_s, 0.0], "a baseline never comes back to level 0"
    with pytest.raises(ReplayError, match="gone"):
        run_all(replace(asked, out=tmp_path / "again"), FakeBackend(tmp_path, dies_at=1), QUIET)
    assert (tmp_path / "again" / "stock" / "result.json").is_file()


def test_turns_are_interleaved_and_may_rotate(tmp_path: Path) -> None:
    """Guards: a run that always follows the same one, repeats in blocks, two runs with one directory."""
    one = comparison(tmp_path, "a", "b", "c", repeats=2)
    assert "".join(turn.name for turn in turns([one])) == "abcabc"
    windows = [replace(one, window=name, out=tmp_path / name) for name in ("calm", "burst")]
    planned = list(turns(windows, rotate=True))
    assert "".join(turn.name for turn in planned) == "abcbcacababc"
    assert [turn.key[0] for turn in planned[::3]] == ["calm", "burst", "calm", "burst"]
    assert len({turn.directory for turn in planned}) == len(planned)
    assert [turn.title for turn in planned[:1]] == ["a 1/2"]
    (single, *_) = turns([replace(one, repeats=1)])
    (of_window, *_) = turns([replace(windows[0], repeats=1)])
    assert (single.directory.name, single.title) == ("a", "a")
    assert of_window.directory.name == "a.1", "another call may add to its repeats"


def test_runs_are_made_one_at_a_time(tmp_path: Path) -> None:
    """Guards: a server that is started for the next run while somebody still looks at the last one."""
    backend = FakeBackend(tmp_path)
    running = run_turns(turns([comparison(tmp_path, "stock", "static_w8")]), backend, QUIET)
    assert next(running).name == "stock" and len(backend.kept) == 1
