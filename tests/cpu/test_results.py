"""Tables of figures: where they go, what a cell says, and what is not measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import readme_figures
import results

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


def document(late: int, nats: float) -> dict[str, Any]:
    """What compare_policies says of one window of 200 requests, under one seed."""
    row = {"requests": 200, "late_percent": late / 2, "nats_per_token": nats, "much_later": 1, "dearer_for_nothing": 0}
    return {
        "windows": 1,
        "policies": {"stock": row, "slo": row},
        "requests_of": {"5/0": 200},
        "by_window": {"5/0": {"stock": [late, 0.0], "slo": [late, nats]}},
    }


SEEDS = [document(0, 0.00071), document(1, 0.0007), document(3, 0.0008)]


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """A committed tree whose commands answer with a window's document; returns the commands that were run."""
    asked: list[tuple[str, ...]] = []

    def answer(*words: str) -> str:
        asked.append(words)
        return json.dumps(SEEDS[len(asked) % 3])

    monkeypatch.setattr(results, "uncommitted", lambda: "")
    monkeypatch.setattr(results, "last_line", answer)
    monkeypatch.setattr(results, "ROOT", tmp_path / "tree")
    (tmp_path / "tree" / "docs").mkdir(parents=True)
    page = "\n".join(["before", *results.marks("gpu_windows"), *results.marks("windows"), "after"])
    (tmp_path / "tree" / "docs" / "slo.md").write_text(page, encoding="utf-8")
    return asked


@pytest.mark.parametrize("name", results.PARTS)
def test_pages_have_the_marks(name: str) -> None:
    """Guards: an hour of measuring that finds no place for its table."""
    page = (ROOT / results.PARTS[name].page).read_text(encoding="utf-8")
    assert "new" in readme_figures.put(page, "new", results.marks(name))


@pytest.mark.parametrize("name", results.PARTS)
def test_figures_say_where_they_come_from(name: str) -> None:
    """Guards: a table without commit or machine, or written by hand between the marks."""
    begin, end = results.marks(name)
    inside = (ROOT / results.PARTS[name].page).read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert f"`make results PARTS={name}`, commit " in inside and ", torch " in inside


def test_a_cell_has_the_median_of_the_seeds_and_the_spread() -> None:
    """Guards: one lucky seed shown for all; a cost told of a server that quantizes nothing."""
    assert results.of_window(SEEDS, "5/0", "slo") == "0.50 % [0.00 %, 1.50 %], 0.00071 [0.00070, 0.00080]"
    assert results.of_window(SEEDS, "5/0", "stock") == "0.50 % [0.00 %, 1.50 %]"
    row = results.over_all(SEEDS)[-1]
    assert row == "| `slo` | 0.50 [0.00, 1.50] | 0.0007 [0.0007, 0.0008] | 1 | 0 |"


def test_a_part_is_written_where_it_belongs_and_not_measured_twice(
    committed: list[tuple[str, ...]], tmp_path: Path
) -> None:
    """Guards: an interrupted call that begins anew; a part that overwrites the other's table."""
    words = ["gpu_windows", "--traces", "T", "--seeds", "2", "--out", str(tmp_path / "out")]
    assert results.main(words) == 0 and [words[-2:] for words in committed] == [("--seed", "0"), ("--seed", "1")]
    page = (tmp_path / "tree" / "docs" / "slo.md").read_text(encoding="utf-8")
    inside = page.partition(results.marks("gpu_windows")[0])[2].partition(results.marks("gpu_windows")[1])[0]
    assert "medians of 2 seeds" in inside and "| `slo` |" in inside and "| `slo` |" not in page.replace(inside, "")
    assert results.main(words) == 0 and len(committed) == 2, "measured again"
    assert (tmp_path / "tree" / "docs" / "slo.md").read_text(encoding="utf-8") == page


def test_what_a_level_lacks_is_a_dash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards: an hour of serving whose table ends in a traceback, as one answer alone passed through a level."""
    row = {"level": "all", "tokens": 1000, "expected_kl": 0.002, "served_kl": 0.001, "seen": 0.9, "logprob": -2.0}
    rows = [row | {"served_kl_error": 0.0001}, row | {"level": "4", "tokens": 7, "served_kl_error": None}]
    kl = {"runs": dict.fromkeys(readme_figures.RUNS, rows)}
    answers = {"demo": "/model", "prepare": "{}", "replay": "{}", "served-kl": json.dumps(kl)}
    asked: list[tuple[str, ...]] = []

    def answer(*words: str) -> str:
        asked.append(words)
        return answers[words[2]]

    monkeypatch.setattr(results, "last_line", answer)
    lines = results.served(results.Asked(results.Kept(tmp_path), None, 1))
    assert lines[4] == "| greedy | MorphServe | 4 | 7 | 0.0020 | 0.00100 | - | 0.900 | -2.00 |"
    replays = [words for words in asked if words[2] == "replay"]
    assert ["--temperature" in words for words in replays] == [False, True]


def test_what_would_be_no_figure_of_this_tree_is_refused(
    committed: list[tuple[str, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards: figures of an older commit, of changes that nobody has, or half a table for want of the traces."""
    out = ["--out", str(tmp_path / "out")]
    assert results.main(["windows", *out]) == 1 and "--traces" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "commit").write_text("another", encoding="utf-8")
    assert results.main(["windows", "--traces", "T", *out]) == 1 and "of another; this is" in capsys.readouterr().err
    monkeypatch.setattr(results, "uncommitted", lambda: " M scripts/results.py")
    assert results.main(["windows", "--traces", "T", *out]) == 1 and "not committed" in capsys.readouterr().err
    assert not committed
