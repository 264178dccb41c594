"""Which policy suits my traffic? Tunes one on simulated windows of one's own traces, in minutes, without a server.

Searches the keys that --space names for few SLO violations at little quality cost (expected KL per token), scores what
it finds on windows that it did not search on, and writes into --out: report.md, pareto.png, importance.png, trials.csv,
one complete MorphServe YAML for each limit of --constraints (best_le_1pct.yaml: at most 1 % violations, least cost),
and study.journal, an Optuna study. An interrupted study goes on where it stopped, and ends as if it never had; a study
with other settings is refused. Everything is simulated from --step-times: measure what you choose with
`morphserve replay`.

Columns of trials.csv: trial, state, on_front, dev_violation_rate, dev_expected_kl_per_token, the same two held_out (of
the front), dev_transitions, dev_preemptions, the two of each dev window, every key of the space, reason (of a refusal).

The last line on stdout is one JSON document: {"made", "trials": {"total", "complete", "pruned"}, "anchors": [{"name",
"dev", "held_out"}], "front": [{"trial", "dev", "held_out"}], "best": [{"max_violation_rate", "trial", "dev",
"held_out", "values", "verdict", "file"}], "importance", "warnings", "report", "study"}.

Example:
    morphserve tune --config demo --step-times step_times.json \\
        --dev convD --dev hybB:rate_scale=1.2 \\
        --held-out hybA --trials 300 --seed 0 --out reports/tune
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from morphserve.config import MorphServeConfig, load_config
from morphserve.profile_ladder import read_ladder
from morphserve.shipped import SEARCH_SPACE, config_file
from morphserve.tools.bench import with_prepared
from morphserve.tools.checks import check_directory
from morphserve.tools.command import command_parser, run_command
from morphserve.tools.options import add_options, read_options
from morphserve.tools.sim import ServerSpec, SimServer, load_calibration
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.evaluate import World, load_windows
from morphserve.tools.tune.space import Space, load_space
from morphserve.tools.workload import Slo, Window, check_times

STUDY_FILE = "study.journal"


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser of all options."""
    parser = command_parser(__doc__, prog)
    _study_options(parser.add_argument_group("study"))
    add_options(parser.add_argument_group("server (as of `morphserve replay`, simulated)"), ServerSpec)
    return parser


def _study_options(group: Any) -> None:
    add = group.add_argument
    trace = "a trace and what to take of it: FILE[:window=START,LEN][:thin=K][:rate_scale=R][:input_scale=F]"
    add("--config", type=config_file, required=True, metavar="YAML", help="MorphServe config: the current policy")
    add("--step-times", type=Path, required=True, metavar="FILE", help="what `morphserve calibrate` measured")
    which = "which keys may move; default: %(default)s"
    add("--space", type=config_file, default=SEARCH_SPACE, metavar="YAML", help=which)
    add(
        "--dev",
        action="append",
        default=[],
        metavar="WINDOW",
        help=f"{trace}[:input_clip=LO,HI][:output_scale=F][:output_clip=LO,HI][:num_requests=N][:seed=S], or a YAML "
        "list of such; policies are tuned on these; repeatable",
    )
    add(
        "--held-out",
        action="append",
        default=[],
        metavar="WINDOW",
        help="likewise; the front is scored on these, and never chosen by them",
    )
    add("--trials", type=int, default=300, metavar="N", help="in all, those of an interrupted run included")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, metavar="DIR", help="study and report; an unfinished study is gone on with")
    add(
        "--constraints",
        type=_limits,
        default=(0.0, 0.01, 0.05),
        metavar="PCT,...",
        help="violations in %% of requests, for each of which the cheapest policy is written; default 0,1,5",
    )
    add("--slo-ttft-s", type=float, default=2.0, help="limit of the time to first token")
    add("--slo-tpot-ms", type=float, default=150.0, help="limit of the time per output token")
    add("--jobs", type=int, default=0, metavar="N", help="simulating processes; 0 = one a core; the result is the same")
    add("--quiet", action="store_true", help="no progress display")


def main(argv: Sequence[str] | None = None, prog: str = "morphserve tune") -> int:
    """Run the command line; the last line on stdout is one JSON document."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    return run_command(
        prog, lambda: _tune(args, _command(args, parser)), "finished trials are kept, run again to go on"
    )


def _tune(args: argparse.Namespace, command: str) -> dict[str, Any]:
    config, space, world = _inputs(args)
    try:
        import matplotlib  # noqa: F401
        import optuna  # noqa: F401
        import rich  # noqa: F401
    except ImportError as e:
        raise TuningError(f'{e}. Install what tuning needs: pip install "morphserve[tune]".') from e
    # Slow to import, and not needed to refuse bad input.
    from morphserve.tools.tune.study import StudyOptions, run_study

    settings = _settings(args, config, space, world)
    made = {"command": command} | {
        key: _shown(getattr(args, key)) for key in ("config", "space", "step_times", "seed")
    } | {"versions": settings["versions"], "code": settings["code"]}  # fmt: skip
    jobs = args.jobs or len(os.sched_getaffinity(0))
    file = args.out / STUDY_FILE
    options = StudyOptions(file, args.trials, args.constraints, args.seed, jobs, args.step_times, args.quiet)
    results, page = run_study(space, world, settings, made, options)
    for warning in results.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    sys.stderr.write(f"{page}\n")
    return results.document({"report": str(page), "study": str(file)})


def _inputs(args: argparse.Namespace) -> tuple[MorphServeConfig, Space, World]:
    """Read and check everything that a user can get wrong.

    Raises:
        MorphServeError: value, limit, remedy.
    """
    for option, value, least in (("--trials", args.trials, 1), ("--jobs", args.jobs, 0)):
        if value < least:
            raise TuningError(f"{option} is {value}, must be at least {least}.")
    check_times(args)
    check_directory(args.out, "--out")
    config = load_config(args.config)
    space = load_space(args.space, config)
    dev, held_out = load_windows(args.dev, args.held_out)
    server = read_options(SimServer, args, restore_wait_s=0.0)  # no tokens come then: nothing that is scored
    slo = Slo(args.slo_ttft_s, args.slo_tpot_ms / 1000.0)
    calibration = load_calibration(args.step_times)
    profile = read_ladder(with_prepared(config, calibration, server))
    return config, space, World((*dev, *held_out), len(dev), server, calibration, slo, profile)


def _settings(args: argparse.Namespace, config: MorphServeConfig, space: Space, world: World) -> dict[str, Any]:
    """Return all that decides what a trial is and scores: a study is gone on with only where they agree."""
    import numpy
    import optuna

    from morphserve.version import __version__

    dev, held_out = [[world.windows[i] for i in indices] for indices in (world.dev, world.held_out)]
    return {
        "versions": {"morphserve": __version__, "optuna": optuna.__version__, "numpy": numpy.__version__},
        "code": _digest(*sorted(_SOURCES.rglob("*.py")), *sorted((_SOURCES.parent / "policies").rglob("*.py"))),
        "seed": args.seed,
        "config": config.model_dump(mode="json", exclude={"cache_dir", "decision_log"}),
        "profile": None if world.profile is None else hashlib.sha256(repr(world.profile).encode()).hexdigest()[:16],
        "space": space.document(),
        "step_times": _digest(args.step_times.expanduser()),
        "slo": {"ttft_s": world.slo.ttft_s, "tpot_s": world.slo.tpot_s},
        "server": asdict(world.server),
        "dev": _window_settings(dev),
        "held_out": _window_settings(held_out),
    }


_SOURCES = Path(__file__).resolve().parents[2]  # the simulator, the controller and all they stand on


def _window_settings(windows: Sequence[Window]) -> dict[str, str]:
    return {f"{number}": f"{w.source} ({w.digest})" for number, w in enumerate(windows)}


def _digest(*files: Path) -> str:
    """Hash the contents of files."""
    together = hashlib.sha256()
    for file in files:
        together.update(hashlib.sha256(file.read_bytes()).digest())
    return together.hexdigest()[:16]


def _command(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Return the command that gives the same result again: without where it goes, and how many processes it takes."""
    words = [*parser.prog.split()]
    for name, value in vars(args).items():
        if name in ("out", "jobs", "quiet") or value == parser.get_default(name):
            continue
        if name == "constraints":
            value = ",".join(f"{limit * 100:g}" for limit in value)
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", *([] if one is True else [_shown(one)])]
    return shlex.join(words)


def _shown(value: object) -> str:
    """Name files of this directory by their short names."""
    inside = isinstance(value, Path) and value.is_relative_to(Path.cwd())
    return str(value.relative_to(Path.cwd())) if inside and isinstance(value, Path) else str(value)


def _limits(text: str) -> tuple[float, ...]:
    try:
        limits = tuple(sorted({float(part) / 100.0 for part in text.split(",")}))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of percentages such as 0,1,5") from e
    if not all(0 <= limit <= 1 for limit in limits):
        raise argparse.ArgumentTypeError(f"{text!r} must be percentages of requests, 0 to 100")
    return limits


