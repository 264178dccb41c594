"""What do README and docs claim in figures? Measures it here, of this tree, and writes each table between its marks.

Each part is one or two tables on one page, with the line that says how they came about: part, commit, processor,
versions, seeds. A part is kept under --out as it is measured, command by command, so that an interrupted call goes on;
figures of another commit, processor or vLLM are never taken. What is simulated may run beside other work; what is
measured on servers (`served`, `paper`, `halves`, `demo`) wants the machine for itself.

Parts, with minutes on a core of an AMD EPYC (Zen 3), three seeds:
  hours        30  the conversation trace as a whole on two machines, every 5th to every 8th request (docs/slo.md)
  windows      15  some 100 windows of 72 s that no rule was made on, from light to hopeless loads (docs/slo.md)
  gpu_windows  10  60 windows of a GPU's shape (docs/slo.md)
  bound        15  what a search that knows the future finds on three windows and 400 s of the trace (docs/tuning.md)
  served       75  KL of what servers answered, greedy and drawn (docs/profiling.md)
  paper        25  three modes beside stock vLLM and 4 bits for good, by the paper's figures of merit (docs/paper.md)
  halves       40  answers of which one half is in 4 bits, greedy and drawn (docs/paper.md)
  demo         60  stock vLLM, MorphServe, W8 for good on windows of real traffic (README.md; scripts/readme_figures.py)

Last stdout line: one JSON document {"of", "parts"}.

    make results PARTS="hours windows gpu_windows bound" TRACES=DIR
    python scripts/results.py --traces DIR --seeds 1 hours
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paper_tables
import readme_figures
from readme_figures import MORPHSERVE, ROOT, begun_at, last_line, put, spread, uncommitted

from morphserve.files import write_whole
from morphserve.tools.checks import at_least
from morphserve.tools.command import command_parser, fail, finish
from morphserve.tools.machine import describe_machine
from morphserve.tools.tables import markdown_table

MACHINES = {
    "docs/results/step_times.json": "docs/results/step_times.json",
    "docs/results/step_times_half_as_fast.json": "half as fast (two shared vCPUs of a Zen 4)",
}
_LIKE_H200 = "docs/results/step_times_like_h200.json"
_POLICIES = {
    "stock": "stock vLLM", "slo": "`slo`", "threshold": "`threshold`, defaults", "static:w8": "W8 for good",
    "static:deepest": "the deepest level for good", "static:fp8": "fp8 for good",
}  # fmt: skip
_BOUND_WINDOWS = ("convD", "hybC", "hybB")
_SERVED = {
    "expected_kl": "{:.4f}", "served_kl": "{:.5f}", "served_kl_error": "{:.5f}", "seen": "{:.3f}", "logprob": "{:.2f}"
}  # fmt: skip
_KV_PICTURE = "docs/img/kv_use.png"
_PROFILES = "morphserve/prepared/shipped"


class Kept:
    """Runs this tree's commands; a last line that is there already is not measured again."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __call__(self, name: str, *words: str) -> Any:
        """Return the last line of `python WORDS` as JSON, kept as `name`."""
        file = self.out / f"{name}.json"
        if not file.is_file():
            write_whole(file, last_line(*words))
        return json.loads(file.read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Asked:
    """What parts are made from."""

    run: Kept
    traces: Path | None
    seeds: int

    def compare(self, name: str, *words: str) -> list[dict[str, Any]]:
        """Return compare_policies' documents, one a seed."""
        command = ("scripts/compare_policies.py", "--traces", str(self.traces), *words)
        return [self.run(f"{name}_{seed}", *command, "--seed", f"{seed}") for seed in range(self.seeds)]


@dataclass(frozen=True, slots=True)
class Part:
    """A place on a page, and what is measured for it."""

    page: str
    how: str  # beside commit and machine
    lines: Callable[[Asked], list[str]]
    needs_traces: bool = True


def hours(asked: Asked) -> list[str]:
    """Return the whole trace's table: by machine and load, late requests and cost of each server."""
    times = [word for file in MACHINES for word in ("--step-times", file)]
    profiled = asked.compare("hours", "--whole", *times, "stock", "slo", "static:w8")
    plain = asked.compare("hours_without", "--whole", *times, "--no-profile", "slo", "static:w8")
    columns = [(profiled, policy) for policy in ("stock", "slo", "static:w8")]
    columns += [(plain, policy) for policy in ("slo", "static:w8")]
    rows = []
    for number, machine in enumerate(MACHINES.values()):
        for thin in (5, 6, 7, 8):
            cells = [of_window(documents, f"{thin}/{number}", policy) for documents, policy in columns]
            rows.append([machine, str(thin), *cells])
    head = ["step times", "K", "stock vLLM", "`slo`", "W8 for good", "`slo`, no profile", "W8 for good, no profile"]
    return markdown_table(head, rows)


def windows(asked: Asked) -> list[str]:
    """Return the table over the windows that are held out."""
    times = [word for file in MACHINES for word in ("--step-times", file)]
    policies = ("stock", "slo", "threshold", "static:w8", "static:deepest")
    return over_all(asked.compare("windows", "--part", "held", *times, *policies))


def gpu_windows(asked: Asked) -> list[str]:
    """Return the table over windows of a GPU's shape."""
    words = ("--gpu", "--part", "all", "--step-times", _LIKE_H200, "stock", "slo", "static:fp8")
    return over_all(asked.compare("gpu_windows", *words))


def bound(asked: Asked) -> list[str]:
    """Return what the best schedule found costs beside what policies do."""
    profile = next((ROOT / _PROFILES).glob("*/profile-*"))
    settings = {name: _settings(asked.run.out / f"bound_{name}.yaml", profile, name) for name in ("slo", "threshold")}
    rows = []
    for window in _BOUND_WINDOWS:
        words = ["--workload", window, "--step-times", next(iter(MACHINES)), "--clairvoyant-runs", "800"]
        rows.append([window, next(iter(MACHINES.values())), *_bound(asked, window, words, settings)])
    trace = [
        "--workload", f"{asked.traces}/azure2023/AzureLLMInferenceTrace_conv.csv", "--window", "600,400", "--thin", "5",
        "--input-scale", "1/16", "--input-clip", "8,120", "--output-clip", "4,384", "--clairvoyant-runs", "1500",
    ]  # fmt: skip
    for number, (file, machine) in enumerate(MACHINES.items()):
        found = _bound(asked, f"trace_{number}", [*trace, "--step-times", file], settings)
        rows.append(["400 s of the trace, K = 5", machine, *found])
    runs = ("stock vLLM", "`threshold`", "`slo`", "W8 for good")
    return markdown_table(["window", "step times", *runs, "regret of `slo`", "best with none late"], rows)


def _bound(asked: Asked, name: str, words: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    runs = ("stock", "threshold", "morphserve", "static_w8")
    found = asked.run(
        f"bound_{name}", *MORPHSERVE, "simulate", *words, "--sim-noise", "0", "--clairvoyant", "--config",
        settings["slo"], "--policy", f"threshold={settings['threshold']}", "--compare", ",".join(runs), "--out",
        str(asked.run.out / f"bound_{name}"),
    )["clairvoyant"]  # fmt: skip
    by_name = {row["name"]: row for row in found["policies"]}
    cells = [
        f"{by_name[run]['violation_rate']:.1%}, {by_name[run]['expected_kl_per_token']:.4f}" for run in runs
    ]
    none_late = [row["expected_kl_per_token"] for row in found["frontier"] if row["late"] == 0]
    return [*cells, f"{by_name['morphserve']['regret']:.4f}", f"{none_late[0]:.4f}" if none_late else "not found"]


def _settings(file: Path, profile: Path, kind: str) -> str:
    """Write the settings of a policy on the demo model's shipped profile, and return where."""
    policy: dict[str, Any] = {"kind": kind}
    if kind == "threshold":
        policy |= {"degrade_above": 0.8, "target_usage": 0.45, "restore_below": 0.6}
    write_whole(file, json.dumps({"version": 1, "prepared": False, "profile": str(profile), "policy": policy}))
    return str(file)


def served(asked: Asked) -> list[str]:
    """Return what was expected and what was served, of greedy answers and of drawn ones."""
    model = last_line(*MORPHSERVE, "demo", "--get-model")
    cache = str(asked.run.out / "cache")  # of its own: other parts are measured with what comes along
    as_served = ("--enforce-eager", "--max-model-len", "512", "--cache-dir", cache)
    asked.run("prepare", *MORPHSERVE, "prepare", model, *as_served, "--without-times", "--json")
    config = asked.run.out / "served.yaml"
    write_whole(config, json.dumps({"version": 1, "cache_dir": cache, "policy": {"kind": "slo"}}))
    rows = []
    for name, words in (("greedy", ()), ("drawn at 1", ("--temperature", "1"))):
        out = asked.run.out / f"served_{len(words)}"
        asked.run(
            out.name, *MORPHSERVE, "replay", "--workload", "convD", "--model", model, "--config", str(config),
            "--enforce-eager", "--compare", "stock,morphserve,static_w8", "--fit", "--top-logprobs", "200", *words,
            "--out", str(out), "--quiet",
        )  # fmt: skip
        found = asked.run(f"{out.name}_kl", *MORPHSERVE, "served-kl", str(out))["runs"]
        for run, label in readme_figures.RUNS.items():
            for row in found[run]:
                if row["level"] == "all" or run == "morphserve":
                    figures = (spread([row[key]], form) for key, form in _SERVED.items())
                    rows.append([name, label, row["level"], f"{row['tokens']:,}", *figures])
    head = ["answers", "run", "level", "tokens", "expected", "served", "+-", "seen", "ln p"]
    return markdown_table(head, rows)


def paper(asked: Asked) -> list[str]:
    """Return the modes' table, at the load that the demo fits to this machine."""
    model = last_line(*MORPHSERVE, "demo", "--get-model")
    fit = asked.run("paper_demo", *MORPHSERVE, "demo", "--out", str(asked.run.out / "paper_demo"))["fit"]
    out = asked.run.out / "paper"
    w4 = asked.run.out / "w4.yaml"
    write_whole(w4, json.dumps(paper_tables.w4_settings()))
    asked.run("paper", *paper_tables.sweep_words(fit, model, out, w4))
    table = paper_tables.modes_table(out, ROOT / _KV_PICTURE)
    return [f"{readme_figures.load(fit)}; limits: {_limits(fit)}.", "", *table]


def _limits(fit: Mapping[str, Any]) -> str:
    return f"TTFT {fit['slo_ttft_s']:.2g} s, TPOT {fit['slo_tpot_ms']:.0f} ms"


def halves(asked: Asked) -> list[str]:
    """Return what it matters which half of an answer is in 4 bits, of greedy answers and of drawn ones."""
    model = last_line(*MORPHSERVE, "demo", "--get-model")
    rows, between = [], []
    for name, words in (("greedy", ()), ("drawn at 1", ("--temperature", "1"))):
        out = asked.run.out / f"halves_{len(words)}"
        found = asked.run(out.name, "scripts/early_late.py", "--model", model, *words, "--out", str(out))
        rows += [[name, *paper_tables.half_cells(row)] for row in found["rows"]]
        between += ["", paper_tables.between_cells(name, found)]
    return [*markdown_table(("answers", *paper_tables.HALVES_HEAD), rows), *between]


PARTS = {
    "hours": Part("docs/slo.md", "simulated", hours),
    "windows": Part("docs/slo.md", "simulated", windows),
    "gpu_windows": Part("docs/slo.md", "simulated", gpu_windows),
    "bound": Part("docs/tuning.md", "simulated without scatter", bound),
    "served": Part("docs/profiling.md", "one run each", served, needs_traces=False),
    "paper": Part("docs/paper.md", "one run each", paper, needs_traces=False),
    "halves": Part("docs/paper.md", "24 answers each", halves, needs_traces=False),
}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "demo"], metavar="PART")
    parser.add_argument("--traces", type=Path, help="directory with azure2023/ and mooncake/, for what is simulated")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="of what is simulated with scatter")
    parser.add_argument("--out", type=Path, default=Path("reports/results"))
    args = parser.parse_args(argv)
    wanted = [name for name in args.parts if name in PARTS]
    wanting = [name for name in wanted if PARTS[name].needs_traces]
    if wanting and args.traces is None:
        why = f"{', '.join(wanting)}: public traces are replayed. Give the directory of azure2023/ as --traces."
        return fail("results", why)
    if changed := uncommitted():
        return fail("results", f"changes are not committed, and figures name a commit:\n{changed}")
    of = measured_on()
    if (begun := begun_at(args.out, of)) != of:
        return fail("results", f"{args.out} has figures of {begun}; this is {of}. Give another --out, or delete it.")
    try:  # before an hour is spent on what has no place
        for name in wanted:
            put((ROOT / PARTS[name].page).read_text(encoding="utf-8"), "", marks(name))
    except (OSError, ValueError) as e:
        return fail("results", f"{PARTS[name].page}: {e}")
    traces = args.traces.resolve() if args.traces else None
    asked = Asked(Kept(args.out.resolve()), traces, args.seeds)
    for name in args.parts:
        if name == "demo":
            if readme_figures.main(["--out", str(args.out / "demo")]):
                return 1
            continue
        try:
            lines = PARTS[name].lines(asked)
        except subprocess.CalledProcessError as e:
            return fail("results", f"{name}: {' '.join(e.cmd[:4])} ... ended with {e.returncode}; see above")
        page = ROOT / PARTS[name].page
        text = "\n".join([provenance(name, of, args.seeds), "", *lines])
        page.write_text(put(page.read_text(encoding="utf-8"), text, marks(name)), encoding="utf-8")
    return finish({"of": of, "parts": args.parts})


def marks(name: str) -> tuple[str, str]:
    """Return what a part's tables stand between."""
    return f"<!-- results: {name} -->", f"<!-- results: {name} end -->"


def measured_on() -> str:
    """Say what figures are of: commit, processor and versions."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {machine[name]}" for name in ("vllm", "torch") if name in machine)
    return f"commit {readme_figures.git('rev-parse', '--short', 'HEAD')}, {machine['cpu']}, {versions}"


def provenance(name: str, of: str, seeds: int) -> str:
    """Say how a part's figures came about."""
    how = PARTS[name].how
    if how == "simulated":
        how += f", medians of {seeds} seeds of the steps' scatter [least, most]" if seeds > 1 else ", one seed"
    return f"*`make results PARTS={name}`, {of}; {how}.*"


def over_all(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return compare_policies' table, medians over seeds."""
    keys = {"late_percent": "{:.2f}", "nats_per_token": "{:.4f}", "much_later": "{:g}", "dearer_for_nothing": "{:g}"}
    policies = documents[0]["policies"]
    rows = []
    for policy in policies:
        found = [document["policies"][policy] for document in documents]
        rows.append([_POLICIES[policy], *(spread([each[key] for each in found], form) for key, form in keys.items())])
    requests = next(iter(policies.values()))["requests"]
    head = ["policy", f"late of {requests:,} (%)", "nats per token", "windows much later", "windows dearer for nothing"]
    return [f"{documents[0]['windows']} windows.", "", *markdown_table(head, rows)]


def of_window(documents: Sequence[Mapping[str, Any]], window: str, policy: str) -> str:
    """Return a policy's late requests and cost on a window, medians over seeds."""
    found = [document["by_window"][window][policy] for document in documents]
    requests = documents[0]["requests_of"][window]
    late = spread([100 * each[0] / requests for each in found], "{:.2f} %")
    return late if policy == "stock" else f"{late}, {spread([each[1] for each in found], '{:.5f}')}"


if __name__ == "__main__":
    sys.exit(main())
