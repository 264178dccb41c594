"""Files of a study: report.md, trials.csv, one YAML for each limit, pictures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from morphserve.config import MorphServeConfig
from morphserve.tools.bench import percent
from morphserve.tools.tables import markdown_table
from morphserve.tools.tune.plots import draw_importance, draw_pareto
from morphserve.tools.tune.results import METHOD, Results
from morphserve.tools.tune.score import Score
from morphserve.tools.tune.search import reason_of, scores_of
from morphserve.tools.tune.selection import Best, in_words, verdict


def write_report(results: Results, out: Path, step_times: Path) -> Path:
    """Write everything but the study file; what an earlier report left there is replaced.

    Returns:
        The report to read first.
    """
    for stale in (*out.glob("best_le_*pct.yaml"), out / "importance.png"):
        stale.unlink(missing_ok=True)
    for p in results.best:
        if p.candidate is not None:
            (out / f"{p.name}.yaml").write_text(policy_yaml(p, results, step_times), encoding="utf-8")
    _write_csv(out / "trials.csv", _rows(results))
    draw_pareto(results, out / "pareto.png")
    if results.importances:
        draw_importance(results.importances, out / "importance.png")
    page = out / "report.md"
    page.write_text(_page(results), encoding="utf-8")
    return page


# ---- the policies


def policy_yaml(p: Best, results: Results, step_times: Path) -> str:
    """Write out a whole config, and where it comes from."""
    assert p.candidate is not None
    config = results.space.with_values(p.candidate.values)
    raw = _complete(config, results.space.config, step_times)
    held_out = p.candidate.held_out
    lines = [
        f"Tuned: least quality cost with at most {percent(p.limit)} SLO violations on the dev windows. Simulated.",
        f"Trial {p.candidate.number} of {len(results.trials)}; seed {results.made['seed']}, "
        f"config {results.made['config']}, space {results.made['space']}.",
        f"dev: {in_words(p.candidate.dev)} ({_sources(results, held_out=False)})",
        f"held-out: {in_words(held_out)} ({_sources(results, held_out=True)})" if held_out else "held-out: none",
        f"{verdict(p.candidate, results.current)}: current has {in_words(results.current.scores.on_dev)} on dev"
        + (f", {in_words(own)} on held-out" if (own := results.current.scores.on_held_out) else ""),
    ]
    return "".join(f"# {line}\n" for line in lines) + "\n" + yaml.safe_dump(raw, sort_keys=False)


def _complete(config: MorphServeConfig, given: MorphServeConfig, step_times: Path) -> dict[str, Any]:
    """Return every key that has a value; what a trial must not do, such as logging, as it was."""
    restored = config.model_copy(update={"decision_log": given.decision_log})
    raw: dict[str, Any] = restored.model_dump(mode="json", exclude_none=True)
    if config.policy.kind == "slo" and config.step_times is None and config.profile is None:
        raw["step_times"] = str(step_times.expanduser().resolve())  # this kind does not start without
    return raw


# ---- the trials


def _rows(results: Results) -> list[dict[str, Any]]:
    held_out = {c.number: c.held_out for c in results.front}
    return [_row(results, trial, held_out) for trial in results.trials]


def _row(results: Results, trial: FrozenTrial, held_out: dict[int, Score | None]) -> dict[str, Any]:
    complete = trial.state is TrialState.COMPLETE
    unseen = held_out.get(trial.number)
    parts = scores_of(trial) if complete else ()
    row: dict[str, Any] = {
        "trial": trial.number,
        "state": "complete" if complete else "pruned",
        "on_front": int(trial.number in held_out),
        "dev_violation_rate": trial.values[0] if complete else None,
        "dev_expected_kl_per_token": trial.values[1] if complete else None,
        "held_out_violation_rate": unseen.violations if unseen else None,
        "held_out_expected_kl_per_token": unseen.cost if unseen else None,
        "dev_transitions": sum(s.transitions for s in parts) if complete else None,
        "dev_preemptions": sum(s.preemptions for s in parts) if complete else None,
    }
    for index in results.world.dev:
        name = results.world.windows[index].name
        row[f"violation_rate:{name}"] = parts[index].violations if complete else None
        row[f"expected_kl_per_token:{name}"] = parts[index].cost if complete else None
    row |= {p.key.path: trial.params[p.key.path] for p in results.space.parameters}
    return row | {"reason": reason_of(trial)}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ---- the page


def _page(results: Results) -> str:
    complete, total = results.num_complete, len(results.trials)
    pruned = "".join(f"\n* pruned {n} times: {reason}" for reason, n in results.refusals.items())
    parts = [
        "# Tuned policies\n\n**Simulated**, not measured: compare with `morphserve replay` before you rely on it.",
        "".join(f"**Warning**: {warning}\n\n" for warning in results.warnings).strip(),
        f"{total} trials, {complete} complete, {total - complete} pruned (a server would refuse them).{pruned}",
        "## Windows\n\n" + _table(("window", "of", "requests", "from"), _window_rows(results)),
        "## Least cost within a limit on violations\n\nThe limit holds on the dev windows.\n\n"
        + _table(("limit", "file", "trial", "dev", "held-out", "verdict"), _best_rows(results)),
        "## Anchors\n\n" + _table(("policy", "dev", "held-out"), _baseline_rows(results)),
        "![violations against quality cost](pareto.png)",
        "## Pareto front\n\n" + _front_table(results),
        "## What decides\n\n" + _importance_text(results),
        "## How to repeat it\n\n" + "\n".join(f"* {key}: {value}" for key, value in results.made.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(head, rows))


def _window_rows(results: Results) -> list[list[str]]:
    return [
        [w.name, "dev" if i in results.world.dev else "held-out", str(len(w.workload.requests)), f"`{w.source}`"]
        for i, w in enumerate(results.world.windows)
    ]


def _best_rows(results: Results) -> list[list[str]]:
    rows = []
    for p in results.best:
        if p.candidate is None:
            rows.append([percent(p.limit), "none", "-", "no trial keeps it", "-", "-"])
            continue
        own = p.candidate
        rows.append(
            [
                percent(p.limit), f"[{p.name}.yaml]({p.name}.yaml)", str(own.number), _score(own.dev),
                _score(own.held_out), verdict(own, results.current),
            ]
        )  # fmt: skip
    return rows


def _baseline_rows(results: Results) -> list[list[str]]:
    return [[b.name, _score(b.scores.on_dev), _score(b.scores.on_held_out)] for b in results.baselines]


def _front_table(results: Results) -> str:
    paths = [p.key.path for p in results.space.parameters]
    rows = [
        [str(c.number), _score(c.dev), _score(c.held_out), *(_value(c.values[path]) for path in paths)]
        for c in results.front
    ]
    return _table(("trial", "dev", "held-out", *paths), rows)


def _importance_text(results: Results) -> str:
    if not results.importances:
        return "Too few trials, or trials too much alike, to tell which parameters decide."
    keys = [p.key.path for p in results.space.parameters]
    columns = list(results.importances)
    rows = [
        [key, *(f"{results.importances[name].get(key, 0.0):.2f}" for name in columns)]
        for key in sorted(keys, key=lambda k: -max(results.importances[name].get(k, 0.0) for name in columns))
    ]
    return f"{METHOD}; shares of 1.\n\n" + _table(("key", *columns), rows)


def _score(score: Score | None) -> str:
    return "-" if score is None else f"{percent(score.violations)}, {score.cost:.4f}"


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sources(results: Results, held_out: bool) -> str:
    world = results.world
    return ", ".join(world.windows[i].source for i in (world.held_out if held_out else world.dev))
