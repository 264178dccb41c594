"""What quality was served? The answers of a replay, held token by token against the model at full precision.

`expected KL` in a report is what a level costs on the text that it was measured on. This is what its answers have paid:
each token's distribution as the server had it, with the KV of whatever levels came before, against that of the model at
full precision for the same text (fp32). It needs a replay that recorded them:

    morphserve replay --workload convD --model MODEL_DIR --compare stock,morphserve --top-logprobs 100 --out reports/q
    morphserve served-kl reports/q

Output columns: run, level (that a token was computed at), tokens, expected (nats each, by the ladder), served (nats a
token, KL(full precision || served)), +- (one standard error over answers), seen (probability, at full precision, of the
tokens that were recorded: the rest counts as one, so `served` is a lower bound, close where seen is close to 1), ln p
(mean log probability of the served tokens at full precision). Stock's row is the server's own rounding.
Last stdout line: one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphserve.hub import find_files
from morphserve.tools.checks import at_least
from morphserve.tools.command import command_parser, run_command, say
from morphserve.tools.quality import LevelRow, level_rows, score_answers
from morphserve.tools.tables import text_table
from morphserve.tools.workload import ANSWERS_FILE, ReplayError, ServedAnswer, load_answers
from morphserve.user_input import user_path

_HEAD = ("run", "level", "tokens", "expected", "served", "+-", "seen", "ln p")


def main(argv: Sequence[str] | None = None, prog: str = "morphserve served-kl") -> int:
    """Score a replay's answers; the last line on stdout is one JSON document."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("report", type=Path, help="directory that `morphserve replay --out` wrote, or one run in it")
    parser.add_argument("--model", metavar="DIR", help="at full precision; default: the one that was served")
    parser.add_argument("--answers", type=at_least(1), metavar="N", help="of each run, spread evenly; default: all")
    args = parser.parse_args(argv)
    return run_command(prog, lambda: _score_all(args), "nothing was written")


def _score_all(args: argparse.Namespace) -> dict[str, Any]:
    runs = {
        directory.name: (_result(directory), _some(load_answers(directory), args.answers))
        for directory in _run_directories(user_path(args.report))
    }
    models = [args.model] if args.model else sorted({str(result["setup"].get("model")) for result, _ in runs.values()})
    if len(models) > 1:
        raise ReplayError(f"{args.report}: runs served {', '.join(models)}. Give the one to compare with as --model.")
    from morphserve.tools.profile import StreamedModel  # torch and transformers: not before they are needed

    model = StreamedModel(find_files(models[0], "model"))
    found: dict[str, list[LevelRow]] = {}
    for name, (result, answers) in runs.items():
        sys.stderr.write(f"{name}: scoring {len(answers)} answers\n")
        found[name] = level_rows(score_answers(model, answers), _ladder(result))
    cells = [_cells(name, row) for name, rows in found.items() for row in rows]
    say("\n".join(text_table(_HEAD, cells)))
    return {"model": models[0], "runs": {name: [row.as_json() for row in rows] for name, rows in found.items()}}


def _run_directories(report: Path) -> list[Path]:
    """Return the directories of runs with recorded answers, in a report or as given.

    Raises:
        ReplayError: there is none.
    """
    found = sorted(file.parent for file in [*report.glob(ANSWERS_FILE), *report.glob(f"*/{ANSWERS_FILE}")])
    if not found:
        raise ReplayError(
            f"{report}: no run with recorded answers ({ANSWERS_FILE}). Replay with `--top-logprobs 100 --out {report}`."
        )
    return found


def _result(directory: Path) -> dict[str, Any]:
    file = directory / "result.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("setup"), dict):
            raise ValueError("not the result of a run")
    except (OSError, ValueError) as e:
        raise ReplayError(f"{file} cannot be read ({e}). Replay again.") from e
    return found


def _ladder(result: dict[str, Any]) -> dict[int, float | None] | None:
    """Return level |-> expected KL; None of a server without the plugin."""
    status = result.get("morphserve_status")
    return None if status is None else {int(row["level"]): row.get("expected_kl") for row in status["ladder"]}


def _some(answers: list[ServedAnswer], number: int | None) -> list[ServedAnswer]:
    if number is None or number >= len(answers):
        return answers
    return [answers[i * len(answers) // number] for i in range(number)]


def _cells(name: str, row: LevelRow) -> tuple[str, ...]:
    return (
        name, row.level, f"{row.tokens:,}", "n/a" if row.expected_kl is None else f"{row.expected_kl:.4f}",
        f"{row.served_kl:.4f}", "n/a" if row.served_kl_error is None else f"{row.served_kl_error:.4f}",
        f"{row.seen:.3f}", f"{row.logprob:.3f}",
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
