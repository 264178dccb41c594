"""What may README claim? Measures it here, of this tree, and writes it between the marks in README.md.

First `morphserve demo`, whose headline README opens with; then stock vLLM, MorphServe as the demo configures it and W8
for good on windows of real traffic: all servers up, taking turns, compiled (`morphserve sweep`, which goes on where it
was interrupted). Limits and load of all windows are those that the demo has fitted to this machine: 150 ms a token say
nothing where a lone one takes 120. Half an hour a repeat on two cores: nothing else may run. The tree must be
committed, because the figures name it.

Columns of the table: window; then for each server, medians over repeats [least, most]: violations, P95 TTFT (s), and
for those that quantize KL (nats per token).
Last stdout line: one JSON document {"commit", "cpu", "headline", "windows"}.

    python scripts/readme_figures.py --repeats 3
    python scripts/readme_figures.py --window convD --window hybB --repeats 1 --out reports/short
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphserve.tools.command import command_parser, fail, finish
from morphserve.tools.machine import describe_machine
from morphserve.tools.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- figures: scripts/readme_figures.py writes what follows -->", "<!-- figures end -->")
WINDOWS = ("hybB", "convD", "convE", "hybA", "conv593", "hybC")
MORPHSERVE = ("-m", "morphserve")  # words of any command of this tree
RUNS = {"stock": "stock vLLM", "morphserve": "MorphServe", "static_w8": "W8 for good"}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--window", action="append", help=f"default: {', '.join(WINDOWS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("reports/readme"))
    args = parser.parse_args(argv)
    args.out = args.out.resolve()  # commands run in the tree, wherever this was started
    if changed := uncommitted():
        return fail("readme_figures", f"changes are not committed, and figures name a commit:\n{changed}")
    commit = git("rev-parse", "--short", "HEAD")
    if (begun := begun_at(args.out, commit)) != commit:
        why = f"{args.out} has runs of commit {begun}, this is {commit}. Give another --out, or delete it."
        return fail("readme_figures", why)
    windows = args.window or list(WINDOWS)
    try:
        demo = _demo(args.out / "demo")
        last_line(
            *MORPHSERVE, "sweep", "--model", last_line(*MORPHSERVE, "demo", "--get-model"), "--config", "demo",
            "--compare", ",".join(RUNS), "--repeats", str(args.repeats), "--out", str(args.out / "sweep"),
            *fitted_words(demo["fit"], windows),
        )  # fmt: skip
    except subprocess.CalledProcessError as e:
        return fail("readme_figures", f"{' '.join(e.cmd[:4])} ... ended with {e.returncode}; see above")
    rows = {(w, run): _results(args.out / "sweep" / w, run) for w in windows for run in RUNS}
    what = {"commit": commit, "cpu": describe_machine()["cpu"], "headline": headline(demo), "load": load(demo["fit"])}
    readme = ROOT / "README.md"
    readme.write_text(put(readme.read_text(encoding="utf-8"), section(what, windows, rows)), encoding="utf-8")
    return finish(what | {"windows": windows})


def uncommitted() -> str:
    """Return what is not committed, but for pages and pictures, which are written; empty = nothing."""
    return git("status", "--porcelain", "--", ".", ":!README.md", ":!docs/*.md", ":!docs/img/*.png")


def begun_at(out: Path, commit: str) -> str:
    """Return the commit of the runs that are in `out` already; where there are none, this one from now on."""
    note = out / "commit"
    if not note.is_file():
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(commit, encoding="utf-8")
    return note.read_text(encoding="utf-8")


def put(text: str, figures: str, marks: tuple[str, str] = MARKS) -> str:
    """Return a page's text with what stands between the marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {marks[0]!r} and {marks[1]!r}. Put them where figures go.")
    return f"{before}{begin}\n\n{figures}\n\n{end}{after}"


def headline(demo: dict[str, Any]) -> str:
    """Say in one sentence what the demo measured."""
    stock, morph = demo["runs"][:2]
    slo = demo["slo"]
    return (
        f"`make demo` (limits fitted to this machine: TTFT {slo['ttft_s']:.2g} s, TPOT {slo['tpot_s'] * 1e3:.0f} ms): "
        f"{stock['violation_rate']:.0%} of stock vLLM's requests late, P95 TTFT {stock['ttft_p95_s']:.1f} s; with "
        f"MorphServe {morph['violation_rate']:.1%}, {morph['ttft_p95_s']:.2f} s, at an expected "
        f"{morph['expected_kl_per_token']:.4f} nats per token."
    )


def fitted_words(fit: dict[str, Any], windows: Sequence[str]) -> list[str]:
    """Return the windows at the demo's load, and its limits, as words of `morphserve sweep`."""
    own = f":thin={fit['thin']:g}:rate_scale={fit['rate_scale']:g}"
    limits = {"--slo-ttft-s": "slo_ttft_s", "--slo-tpot-ms": "slo_tpot_ms", "--cutoff": "cutoff_s"}
    words = [word for flag, key in limits.items() for word in (flag, f"{fit[key]:g}")]
    return [*_each("--window", [f"{window}{own}" for window in windows]), *words]


def load(fit: dict[str, Any]) -> str:
    """Say what the demo has made of a window of 72 s."""
    if fit["thin"] > 1:
        return f"A window is 72 s of traffic, of which one request in {fit['thin']:g} is sent"
    if fit["rate_scale"] > 1:
        return f"A window is 72 s of traffic, sent {fit['rate_scale']:g} times as fast"
    return "A window is 72 s of traffic"


def section(what: dict[str, Any], windows: Sequence[str], rows: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Return what goes between the marks."""
    repeats = max(len(found) for found in rows.values())
    head = ["window", *(f"{name}: late, P95 TTFT{'' if run == 'stock' else ', KL'}" for run, name in RUNS.items())]
    table = markdown_table(head, [[w, *(cell(rows[w, run], run) for run in RUNS)] for w in windows])
    chosen = "" if tuple(windows) == WINDOWS else "".join(f"--window {window} " for window in windows)
    spread = f"medians of {repeats} interleaved repeats [least, most]" if repeats > 1 else "one run each"
    return "\n".join([
        what["headline"],
        "",
        f"`python scripts/readme_figures.py {chosen}--repeats {repeats}`, {what['cpu']}, "
        f"commit {what['commit']}; {spread}. "
        f"{what['load']}: one or two bursts. Limits as above.",
        "",
        *table,
    ])  # fmt: skip


def cell(rows: Sequence[dict[str, Any]], run: str) -> str:
    """Return a server's figures on one window."""
    shown = [("violation_rate", "{:.1%}"), ("ttft_p95_s", "{:.2f} s")]
    if run != "stock":
        shown.append(("expected_kl_per_token", "{:.4f}"))
    return ", ".join(spread([row[key] for row in rows], form) for key, form in shown)


def spread(values: Sequence[float | None], form: str) -> str:
    """Return the median, and least and most where they look different; a dash where nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, middle, high = (form.format(value) for value in (min(known), statistics.median(known), max(known)))
    return middle if low == high else f"{middle} [{low}, {high}]"


def _demo(out: Path) -> dict[str, Any]:
    """Return the demo's last line, of an earlier call if there is one."""
    file = out / "last_line.json"
    if not file.is_file():
        line = last_line(*MORPHSERVE, "demo", "--out", str(out))
        file.write_text(line, encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _results(directory: Path, run: str) -> list[dict[str, Any]]:
    files = sorted(directory.glob(f"{run}.*/result.json"))
    if not files:
        raise FileNotFoundError(f"{directory} has no result of {run}")
    return [json.loads(file.read_text(encoding="utf-8"))["figures"] for file in files]


def _each(flag: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def last_line(*words: str) -> str:
    """Run `python WORDS` in this tree; return its last line on stdout."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def git(*words: str) -> str:
    """Return what git says of this tree."""
    return subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
