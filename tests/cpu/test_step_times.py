"""Step times: fitted, stored, mixed by layers, and refused when they are no times."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from morphserve.errors import MorphServeError
from morphserve.tools.profile.step_time_fit import fit_step_time
from policies import LayerMove, MorphLevel, StepLoad, StepTime, StepTimes, load_step_times

BASE = StepTime(0.010, 4e-4, 2e-4, 1e-6)
W8 = StepTime(0.006, 3e-4, 1e-4, 1e-6)
LONE = StepTime(0.010, 4e-4, 0.0, 1e-6)  # prefill is free
TIMES = StepTimes({"base": BASE, "w8": W8}, LayerMove(0.001, 0.002), 0.004, {"base": 0.02}, "m", "cpu")


NEGATIVE = {"base_s": -1, "per_seq_s": 0, "per_prefill_token_s": 0, "per_context_token_s": 0}


def steps(time: StepTime, count: int, noise: float = 0.0, seed: int = 0) -> list[StepLoad]:
    """Timed steps of a machine that obeys `time`."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        seqs, prefill = rng.choice([1, 2, 4, 8, 16, 32]), rng.choice([0, 0, 0, 50, 300])
        context = seqs * rng.choice([20, 200, 400])
        seconds = time.seconds(seqs, prefill, context) * (1 + noise * rng.gauss(0, 1))
        out.append(StepLoad(seconds, seqs, prefill, context, 0))
    return out


def test_the_fit_finds_what_made_the_times() -> None:
    """Guards: a coefficient that is lost, or credited with another's time."""
    found, error = fit_step_time(steps(BASE, 200))
    assert error < 1e-6
    for name in ("base_s", "per_seq_s", "per_prefill_token_s", "per_context_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(BASE, name), rel=1e-4)


def test_the_fit_survives_stalls_and_never_goes_below_zero() -> None:
    """Guards: one stall of the machine bends every prediction; negative times for unusual steps."""
    noisy = steps(BASE, 300, noise=0.03)
    noisy += [StepLoad(1.0, 4, 0, 80, 0)] * 3
    found, error = fit_step_time(noisy)
    assert error < 0.05
    assert found.seconds(16, 0, 3200) == pytest.approx(BASE.seconds(16, 0, 3200), rel=0.05)
    free = StepTime(0.01, 0.0, 1e-4, 0.0)
    found, _ = fit_step_time(steps(free, 200, noise=0.05, seed=3))
    assert min(found.per_seq_s, found.per_prefill_token_s, found.per_context_token_s) >= 0


def test_steps_that_never_prefill_are_fitted() -> None:
    """Guards: a calibration that dies of a coefficient nothing was timed for."""
    found, error = fit_step_time([replace(step, prefill_tokens=0) for step in steps(LONE, 200)])
    assert error < 1e-6
    assert (found.per_prefill_token_s, found.per_seq_s) == (0, pytest.approx(LONE.per_seq_s, rel=1e-4))


def test_too_few_steps_are_refused() -> None:
    """Guards: a model fitted to nothing."""
    with pytest.raises(MorphServeError, match="5 timed steps, needs 20"):
        fit_step_time(steps(BASE, 5))


def test_a_level_is_the_mean_of_its_layers() -> None:
    """Guards: a mixed level taken for one of its formats; halves counted as whole layers."""
    level = MorphLevel(1, ("w8", "base", "w8", "base"), 1, 2)
    assert TIMES.of_level(level).base_s == pytest.approx(0.008)
    halves = TIMES.of_level(MorphLevel(1, ("base/w8",), 1, 2))
    assert halves.base_s == pytest.approx(0.010 - 5 / 6 * 0.004)


def test_an_uncalibrated_format_says_what_to_do() -> None:
    """Guards: KeyError in a server's start-up."""
    with pytest.raises(ValueError, match="'w4' are not known, only those of base, w8. Run `morphserve calibrate`"):
        TIMES.of_level(MorphLevel(1, ("w4",), 1, 2))


def test_written_and_read_again(tmp_path: Path) -> None:
    """Guards: a figure lost on the way to the disk."""
    (tmp_path / "times.json").write_text(json.dumps(TIMES.document()))
    assert load_step_times(tmp_path / "times.json") == TIMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 7}, "schema 7, this version reads 1"),
        ({"formats": {}}, "no times of 'base'"),
        ({"formats": {"base": {"base_s": 0.01}}}, "missing"),
        ({"formats": {"base": NEGATIVE}}, "0 s or more"),
        ({"move": {"degrade_s": float("nan"), "restore_s": 0}}, "move.degrade_s is nan"),
        ({"move": None}, "must be a mapping|mapping"),
        ({"offset_s": None}, "offset_s is None"),
        ({"offset_s": -5}, "offset_s is -5"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """Guards: predictions from figures that are no times."""
    (tmp_path / "times.json").write_text(json.dumps(TIMES.document() | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_step_times(tmp_path / "times.json")
    assert "morphserve calibrate" in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """Guards: a traceback instead of a remedy."""
    with pytest.raises(ValueError, match="No such file"):
        load_step_times(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"schema": 1, "formats": {')
    with pytest.raises(ValueError, match="not JSON"):
        load_step_times(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="schema 'list'"):
        load_step_times(tmp_path / "list.json")
