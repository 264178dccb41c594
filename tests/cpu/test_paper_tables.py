"""Figures beside the paper's: which way ratios go, what counts as use of the KV cache, and halves of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import early_late
import numpy as np
import paper_tables
import pytest

from morphserve.config import parse_config
from morphserve.tools.quality import Scored
from morphserve.tools.workload import ReplayError, ServedAnswer

pytestmark = pytest.mark.cpu

FIT = {"thin": 2.0, "rate_scale": 1.0, "slo_ttft_s": 3.0, "slo_tpot_ms": 400.0, "cutoff_s": 150.0}
SERIES = [
    {"t_s": 0.0, "blocks_published": 50, "blocks_used": 0, "running": 0, "waiting": 0},
    {"t_s": 1.0, "blocks_published": 50, "blocks_used": 40, "running": 3, "waiting": 1},
    {"t_s": 2.0, "blocks_published": 100, "blocks_used": 60, "running": 6, "waiting": 0},
    {"t_s": 3.0, "blocks_published": None, "blocks_used": None, "running": 6, "waiting": 0},
]


def result(**figures: Any) -> dict[str, Any]:
    """What a run's file has."""
    usual = {"violation_rate": 0.5, "ttft_p95_s": 6.0, "expected_kl_per_token": None, "tpot_p50_ms": 100.0,
             "tpot_p99_ms": 200.0, "kv_blocks_max": 50, "output_tok_s": 100.0}  # fmt: skip
    return {"figures": usual | figures, "series": SERIES, "completed": 10, "num_prompts": 10}


WINDOW = {
    "stock": result(),
    "morphserve": result(violation_rate=0.0, ttft_p95_s=2.0, expected_kl_per_token=0.01, tpot_p99_ms=100.0,
                         kv_blocks_max=75, output_tok_s=150.0),
    "w4": result(violation_rate=0.0, ttft_p95_s=1.0, expected_kl_per_token=0.1, kv_blocks_max=150),
}  # fmt: skip


def test_each_figure_stands_beside_its_reference() -> None:
    """Guards: a ratio the wrong way round, or W4's quality compared with stock's."""
    cells = paper_tables.mode_cells([WINDOW, WINDOW], WINDOW, "morphserve")
    assert cells == ["0.0%", "3.0", "0.0100", "90%", "1.00, 0.50", "+50%", "70%", "1.50"]
    assert paper_tables.mode_cells([WINDOW], WINDOW, "w4")[1:4] == ["6.0", "0.1000", "-"]
    stock = paper_tables.mode_cells([WINDOW], WINDOW, "stock")
    assert stock == ["50.0%", "1", "0", "-", "1.00, 1.00", "+0%", "70%", "1.00"]


def test_a_sweeps_directory_becomes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the servers' own directory taken for a window; throughput of a server that was cut off, unsaid."""
    monkeypatch.setattr(paper_tables, "RUNS", {run: run for run in WINDOW})
    for window in (*paper_tables.WINDOWS, "convD#2"):
        for run, found in WINDOW.items():
            file = tmp_path / window / f"{run}.1" / "result.json"
            file.parent.mkdir(parents=True)
            done = 8 if window.endswith("#2") and run == "morphserve" else 10
            file.write_text(json.dumps(found | {"completed": done}))
    (tmp_path / "servers" / "stock").mkdir(parents=True)
    lines = paper_tables.modes_table(tmp_path, tmp_path / "kv.png")
    assert "At saturation cut off before all had their answers: morphserve." in lines[0]
    assert lines[5].startswith("| morphserve | 0.0% | 3.0 |") and lines[5].endswith("| 70% | - |")
    assert lines[6].endswith("| 1.00 |") and "(img/kv.png)" in lines[-2]


def test_kv_in_use_is_of_the_time_that_anybody_is_there() -> None:
    """Guards: the idle seconds before and after a burst, which would make every server look as if it wasted memory."""
    assert paper_tables.kv_in_use(SERIES) == pytest.approx((40 / 50 + 60 / 100) / 2)
    assert paper_tables.kv_in_use(SERIES[:1]) is None


def test_all_windows_have_the_demos_load_and_limits() -> None:
    """Guards: a saturated window that is not thinned as the others are, or limits of another machine."""
    words = paper_tables.sweep_words(FIT, "/model", Path("out"), Path("w4.yaml"))
    windows = [words[i + 1] for i, word in enumerate(words) if word == "--window"]
    assert windows == ["convD:thin=2:rate_scale=1", "convD:thin=2:rate_scale=40"] and "w4=w4.yaml" in words
    assert words[words.index("--slo-ttft-s") + 1] == "3" and words[words.index("--slo-tpot-ms") + 1] == "400"
    assert words[-2:] == ["--cutoff", "750"], "throughput of those that were answered in time alone"
    assert set(words[words.index("--compare") + 1].split(",")) == set(paper_tables.RUNS)
    parse_config(paper_tables.w4_settings(), source="w4")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """Guards: a table that is lost, as a server's page had no blocks for a moment."""
    paper_tables.draw_kv({"stock vLLM": SERIES, "W4 for good": SERIES}, tmp_path / "kv.png")
    assert (tmp_path / "kv.png").read_bytes().startswith(b"\x89PNG")


def answer(tokens: list[int], levels: list[int]) -> ServedAnswer:
    """An answer, without what was likely at each token."""
    nothing = np.zeros((len(tokens), 0))
    return ServedAnswer(
        np.zeros(4, np.int32), np.array(tokens, np.int32), nothing.astype(np.int32), nothing.astype(np.float32),
        np.array(levels, np.int16),
    )  # fmt: skip


def scored(kl: list[float], levels: list[int]) -> Scored:
    """An answer as full precision sees it."""
    return Scored(np.array(kl), np.ones(len(kl)), -np.arange(len(kl), dtype=float), np.array(levels, np.int16))


def test_halves_of_answers_are_told_apart() -> None:
    """Guards: a way whose second half is counted with the first, or shown as unlike an answer that it repeats."""
    full, late = ([answer([1, 2, 3, 4, 5, last], [0] * 6), answer([5] * 6, [0] * 6)] for last in (4, 9))
    seen = [scored([0, 0, 0, 9, 0.2, 0.4], [0, 0, 0, 0, 1, 1]), scored([0, 0, 0, 9, 0.4, 0.6], [0, 0, 0, 0, 1, 1])]
    first, second = early_late.way_rows("late", seen, 1, {"full": full, "late": late})
    assert (first["kl"], first["in_format"], first["same"], first["tokens"]) == (0.0, 0.0, 1.0, 6)
    assert (second["in_format"], second["same"], second["logprob"], second["tokens"]) == (1.0, 0.5, -4.5, 4)
    assert second["kl"] == pytest.approx(0.4) and second["kl_error"] == pytest.approx(0.1)
    cells = ["second", "second", "100%", "0.4000", "0.1000", "-4.500", "0.000"]
    assert paper_tables.half_cells(second) == [*cells, "50%"]
    (drawn, _) = early_late.way_rows("late", seen, 1, None)
    assert paper_tables.half_cells(drawn)[-1] == "-", "drawn answers are never the same"


def test_ways_are_held_against_each_other_prompt_by_prompt() -> None:
    """Guards: scatter between prompts taken for error of a difference; the tokens of a change counted."""
    early = [scored([1, 1, 7, 1], [1, 1, 1, 0]), scored([3, 3, 7, 3], [1, 1, 1, 0])]
    late = [scored([0, 0, 7, 1.5], [0, 0, 0, 1]), scored([2, 2, 7, 3.5], [0, 0, 0, 1])]
    assert early_late.paired(early, late, 1, "kl") == pytest.approx((0.5, 0.0))
    found = {"early_minus_late": {"kl": (0.5, 0.0), "logprob": (-0.1, 0.02)}, "left_out": 7}
    assert "KL +0.5000 +- 0.0000, ln p -0.100 +- 0.020; 7 tokens" in paper_tables.between_cells("greedy", found)


def test_the_tokens_of_a_change_are_as_many_as_the_slowest_one_took() -> None:
    """Guards: one way with more tokens in 4 bits than the other, as the way back takes longer than the way there."""
    levels = {"full": [0] * 8, "late": [0] * 5 + [1] * 3, "early": [1] * 6 + [0] * 2, "all": [1] * 8}
    answers = {way: [answer([1] * 8, those)] for way, those in levels.items()}
    assert early_late.tokens_of_change(answers) == 2
    assert early_late.halves_of(8, 2) == (slice(0, 4), slice(6, 8))
    for way, wrong in (("late", [0] * 8), ("full", [0, 1] + [0] * 6), ("all", [1] * 7 + [-1])):
        with pytest.raises(ReplayError, match=f"{way}: .* Raise --output-tokens"):
            early_late.tokens_of_change({**answers, way: [answer([1] * 8, wrong)]})
