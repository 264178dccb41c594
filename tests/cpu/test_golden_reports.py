"""Reports as they were written when these files were last looked at, byte for byte.

A report that is to change: delete its file, run this (a missing file is written, and its test fails once), read the
difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cpu import sim_world, tuning_world
from cpu.test_replay_compare import WORKLOAD, made_up
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from morphserve.tools.bench.report import plots
from morphserve.tools.bench.report.report import write_report as write_comparison
from morphserve.tools.bench.report.summary import summarize
from morphserve.tools.bench.sweep import report as sweep
from morphserve.tools.gpucheck.results import Findings as PartFindings
from morphserve.tools.gpucheck.results import PartResult, Verdict
from morphserve.tools.gpucheck.results import summarize as figure
from morphserve.tools.gpucheck.tables import render
from morphserve.tools.tune import report as tuning
from morphserve.tools.tune.baselines import Baseline
from morphserve.tools.tune.evaluate import World
from morphserve.tools.tune.results import Results
from morphserve.tools.tune.score import Score, Scores
from morphserve.tools.tune.selection import Best, Candidate
from morphserve.tools.workload import Slo, Window

pytestmark = pytest.mark.cpu

GOLDEN = Path(__file__).parent / "golden"


def same(name: str, text: str) -> None:
    """Hold a report to its file."""
    file = GOLDEN / name
    if not file.exists():
        file.write_bytes(text.encode())
        pytest.fail(f"{file} was missing and is written now: look at it.")
    assert text == file.read_bytes().decode()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bytes of a picture differ from one matplotlib to the next."""
    for module, name in (
        (plots, "timeline"), (plots, "distribution"), (tuning, "draw_pareto"), (tuning, "draw_importance"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda what, path: path.write_bytes(b"picture"))
    yield


def test_a_comparison(tmp_path: Path) -> None:
    """Guards: rows, groups and cells of all three files: what has no value, spreads, what only some repeats know."""
    setup = {"cores": 2, "cpu": "A <CPU>", "vllm": "0.32.0", "python": "3.11.7", "command": "vllm serve | tee"}
    runs = [
        replace(made_up("stock", 5.0, None, None, 0.0), setup=setup),
        replace(made_up("morphserve", 0.1, 0, {"0": 75, "1": 25}, 0.02), setup=setup),
        replace(made_up("stock", 6.5, None, None, 0.0), setup=setup),
        replace(made_up("morphserve", 0.2, 1, {"0": 50, "2": 50}, 0.02), setup=setup),
    ]
    first, last = runs[1].series
    away = replace(first, t_s=3.0, level=1, waiting=2)
    moved = replace(last, transitions={"degrade/committed": 2}, transition_s=0.25, pause_max_ms=12.5, preemptions=3)
    runs[1] = replace(runs[1], series=[replace(first, preemptions=1), away, moved])
    runs = [replace(run, directory=tmp_path / f"{run.name}.{i // 2 + 1}") for i, run in enumerate(runs)]
    write_comparison(summarize(WORKLOAD, "<w>.jsonl", Slo(), runs), runs, tmp_path)
    for name in ("summary.md", "summary.json", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        same(f"comparison_{name}", text.replace(str(tmp_path), "OUT"))


def test_a_report_says_how_answers_were_made(tmp_path: Path) -> None:
    """Guards: drawn answers reported as greedy ones."""
    for temperature, words in ((0.0, "tokens, greedy, sent"), (0.7, "tokens, drawn at temperature 0.7, sent")):
        of = {"setup": {"temperature": temperature}, "directory": tmp_path / "stock"}
        runs = [replace(made_up("stock", 5.0, None, None, 0.0), **of)]
        write_comparison(summarize(WORKLOAD, "w.jsonl", Slo(), runs), runs, tmp_path)
        assert words in (tmp_path / "report.html").read_text(encoding="utf-8")


def row(rate: float, kl: float | None = None, **more: object) -> dict[str, object]:
    """Figures of a run."""
    figures = {"output_tok_s": 200.0, "duration_s": 80.0, "preemptions": 10, "ttft_p95_s": 1.234, "tpot_p99_ms": 98.7}
    return {"sent": 100, "violation_rate": rate, "expected_kl_per_token": kl} | figures | more


def test_a_sweep() -> None:
    """Guards: tables of windows, of all together and of the agreement; runs without a figure; unfinished answers."""
    measured = {
        ("calm", "stock"): [row(0.4), row(0.35)],
        ("calm", "slo"): [row(0.012, 0.02, statuses={"ok": 99, "error": 1}), row(0.02, 0.03)],
        ("burst", "stock"): [row(0.3, preemptions=None), row(0.3)],
        ("burst", "slo"): [row(0.1, 0.04, transitions=4, level_zero_after_s=2.5), row(0.2, 0.05)],
    }
    simulated = {
        key: {0.9: row(0.1, 0.02), 1.0: row(0.2, 0.03), 1.1: row(0.3, 0.04, duration_s=99.0)} for key in measured
    }
    same("sweep_simulated.md", sweep.markdown(measured, simulated, "A sweep"))
    same("sweep.md", sweep.markdown(measured, {}, "A sweep", "seeds"))


def test_a_gpu_check() -> None:
    """Guards: each kind of section, and the cells that have nothing in them."""
    found = PartFindings(
        figures=[figure("copy", "GB/s", [50.0, 51.5, 49.0]), figure("map", "us", [7.25])],
        verdicts=[Verdict("fast", True, "51 | 49", False), Verdict("whole", False, "two\nlines", True)],
        notes=["one line", "two\nlines"],
    )
    sensors = {"before": {"sm_mhz": 345.0, "name": "x"}, "after": {"sm_mhz": 1980.0, "name": "x"}}
    results = [
        PartResult("t1", "arena", "ok", "", 1.5, 60.0, sensors, found),
        PartResult("t2", "remap", "failed", "a | b", 0.25, 60.0, output_tail="```\nend"),
        PartResult("t3", "copy", "skipped", "no device"),
    ]
    same("gpu_check.md", render({"gpu": "a|b", "cores": 2}, results, dry=True, note="Not run yet: t4."))
    same("gpu_check_empty.md", render({}, [], dry=False))


def scores(dev: int, held_out: int | None = None) -> Scores:
    """So many late requests of a thousand, and as many ten-thousandths of a nat a token."""
    made = [Score(1000, late, 1000, late / 10, 3, 4) for late in (dev, held_out) if late is not None]
    return Scores(tuple(made[:1]), tuple(made[1:]))


def trial(number: int, late: int | None) -> FrozenTrial:
    """One that was scored, or was refused."""
    distributions = {
        "policy.degrade_above": FloatDistribution(0.5, 1.0), "policy.max_level": CategoricalDistribution(["w8", "w4"])
    }  # fmt: skip
    params = {"policy.degrade_above": 0.75 if late is None else 0.5 + late / 10_000, "policy.max_level": "w8"}
    if late is None:
        attrs: dict[str, object] = {"reason": "level 3 wants 400 blocks"}
        made = create_trial(state=TrialState.PRUNED, params=params, distributions=distributions, user_attrs=attrs)
    else:
        own = scores(late).on_dev
        values, attrs = [own.violations, own.cost], {"scores": [asdict(own)]}
        made = create_trial(values=values, params=params, distributions=distributions, user_attrs=attrs)
    made.number = number
    return made


def test_a_study(tmp_path: Path) -> None:
    """Guards: every table of a study, a limit that no trial keeps, windows that nobody held out."""
    keys = {"policy.degrade_above": {"low": 0.5, "high": 1.0}, "policy.max_level": {"choices": ["w8", "w4"]}}
    space = tuning_world.make_space(tmp_path, keys)
    windows = tuple(Window(name, f"{name}.jsonl", WORKLOAD) for name in ("calm", "burst"))
    trials = [trial(0, 20), trial(1, None), trial(2, 300)]
    tuned = Candidate(0, trials[0].params, scores(20, 15))
    results = Results(
        World(windows, 1, sim_world.SERVER, sim_world.CALIBRATION, Slo()), space, trials,
        [Baseline("stock", None, scores(600, 500)), Baseline("current", space.config, scores(100))],
        [tuned, Candidate(2, trials[2].params, scores(300))], [Best(0.01, None), Best(0.05, tuned)],
        {"violations": {"policy.degrade_above": 0.75}, "cost": {"policy.max_level": 1.0}}, ["a | warning"],
        {"seed": 1, "config": "config.yaml", "space": "space.yaml"},
    )  # fmt: skip
    report = tuning.write_report(results, tmp_path, Path("/step_times.json"))
    same("study_report.md", report.read_text(encoding="utf-8"))
    same("study_trials.csv", (tmp_path / "trials.csv").read_bytes().decode())
