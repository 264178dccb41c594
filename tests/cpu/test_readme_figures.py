"""README's figures: where they go, and what a cell says."""

from __future__ import annotations

from pathlib import Path

import pytest
import readme_figures as figures

from morphserve.tools.bench.sweep.cli import build_parser
from morphserve.tools.workload import read_windows

_ROW = {"violation_rate": 0.0, "ttft_p95_s": 0.1, "expected_kl_per_token": 0.004}


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    """Guards: figures written twice, or over README's own words."""
    text = "\n".join(["before", figures.MARKS[0], "old", figures.MARKS[1], "after"])
    once = figures.put(text, "new")
    assert "old" not in once and once.startswith("before\n") and once.endswith("\nafter")
    assert figures.put(once, "new") == once


@pytest.mark.parametrize("mark", figures.MARKS)
def test_a_readme_without_a_mark_is_refused(mark: str) -> None:
    """Guards: half an hour of measuring that ends in a README cut off at the first mark."""
    with pytest.raises(ValueError, match="lacks the marks"):
        figures.put("\n".join(figures.MARKS).replace(mark, ""), "new")


def test_the_readme_has_the_marks() -> None:
    """Guards: a README rewritten without the place where its figures go."""
    figures.put((figures.ROOT / "README.md").read_text(encoding="utf-8"), "new")


def test_runs_of_another_commit_are_told_apart(tmp_path: Path) -> None:
    """Guards: an interrupted run that goes on in a later tree, whose figures are said to be of that one."""
    assert figures.begun_at(tmp_path / "reports", "abc") == "abc"
    assert figures.begun_at(tmp_path / "reports", "def") == "abc"


def test_a_cell_shows_the_median_and_the_spread() -> None:
    """Guards: a best run shown for all; a quality cost claimed of a server that quantizes nothing."""
    rows = [_ROW, _ROW | {"ttft_p95_s": 0.3}, _ROW | {"ttft_p95_s": 0.2}]
    assert figures.cell(rows, "morphserve") == "0.0%, 0.20 s [0.10 s, 0.30 s], 0.0040"
    assert figures.cell([_ROW], "stock") == "0.0%, 0.10 s"


def test_windows_have_the_load_and_the_limits_of_the_demo() -> None:
    """Guards: a table in which a slow machine's servers are all late, or a fast one's none, by limits of another."""
    fit = {"thin": 3.5, "rate_scale": 1.0, "slo_ttft_s": 16.0, "slo_tpot_ms": 1300.0, "cutoff_s": 110.0}
    words = figures.fitted_words(fit, ["hybB", "convD"])
    assert words[:4] == ["--window", "hybB:thin=3.5:rate_scale=1", "--window", "convD:thin=3.5:rate_scale=1"]
    args = build_parser("sweep").parse_args([*words, "--out", "o"])
    assert (args.slo_ttft_s, args.slo_tpot_ms, args.cutoff) == (16.0, 1300.0, 110.0)
    windows = read_windows(args.window)
    assert [window.name for window in windows] == ["hybB", "convD"]
    assert len(windows[1].workload.requests) == 23, "as the demo's on such a machine"
    assert figures.load(fit).endswith("one request in 3.5 is sent")
    assert figures.load(fit | {"thin": 1.0, "rate_scale": 1.5}).endswith("sent 1.5 times as fast")
