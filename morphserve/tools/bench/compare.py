"""Run the servers of a comparison one after another, on the same workload and the same machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from morphserve import cpu_tier
from morphserve.config import load_config, parse_config, step_times_file
from morphserve.control import ladder_formats
from morphserve.serve_dtype import model_dtype
from morphserve.tools.bench.load.measure import Measurement, measure
from morphserve.tools.bench.load.server import Server, ServerOptions, serve
from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.machine import describe_machine
from morphserve.tools.workload import Outcome, ReplayError, Slo
from policies import StepTimes, load_step_times

log = logging.getLogger(__name__)

STOCK, MORPHSERVE = "stock", "morphserve"
_STATIC = "static_"  # before the format that all layers of an anchor have
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")  # a directory is called by it


class Progress(Protocol):
    """What the user sees while it runs."""

    def starting(self, title: str) -> None: ...

    def fitting(self, title: str) -> None: ...

    def waiting(self, seconds: float) -> None: ...

    def measuring(self, title: str, num_requests: int) -> None: ...

    def request_done(self, outcome: Outcome) -> None: ...

    def finished(self, result: RunResult) -> None: ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which runs, how often, with what."""

    names: tuple[str, ...]
    server: ServerOptions
    measurement: Measurement  # its client.url is set per server
    out: Path
    config: Path | None = None  # YAML of the morphserve run; the static runs derive theirs from it
    policies: Mapping[str, Path] = field(default_factory=dict)  # YAML of further runs by name
    repeats: int = 1
    promise: Slo | None = None  # what a policy that keeps promises is to keep; None = what its own YAML says
    setup: dict[str, Any] | None = None  # recorded with every run

    def check(self, is_simulated: bool = False) -> None:
        """Refuse before the first server starts what would fail at the second.

        Args:
            is_simulated: step times come from elsewhere.

        Raises:
            ReplayError: unknown or repeated run names, a missing --config, a format or step times that are not there.
            ConfigError: a config that MorphServe would refuse.
        """
        if taken := [n for n in self.policies if n in (STOCK, MORPHSERVE) or static_format(n) or not _NAME.match(n)]:
            raise ReplayError(
                f"--policy {', '.join(taken)}: a name is of letters, digits, '.', '_' and '-', and none of {STOCK}, "
                f"{MORPHSERVE} and {_STATIC}FORMAT."
            )
        known = (STOCK, MORPHSERVE, *self.policies)
        unknown = [n for n in self.names if n not in known and not static_format(n)]
        if unknown or not self.names or len(set(self.names)) != len(self.names):
            raise ReplayError(
                f"--compare {','.join(self.names)}: choose from {', '.join(known)} and static_FORMAT (static_w8), "
                "each at most once."
            )
        if self.repeats < 1:
            raise ReplayError(f"--repeats is {self.repeats}, must be at least 1.")
        for name in self.names:
            if name != STOCK:
                self._check_config(name, is_simulated)

    def _check_config(self, name: str, is_simulated: bool) -> None:
        path = self.config_of(name)
        config = load_config(path)
        fmt = static_format(name)
        if fmt and config.ladder.steps != "profile" and config.profile is None:
            known = ladder_formats(config.ladder)
            if fmt not in known:
                raise ReplayError(
                    f"--compare {name}: the ladder of {path} has no format {fmt!r}, only {', '.join(known)}. Take one "
                    "of these, or add it to ladder.steps."
                )
        if config.policy.kind == "slo" and not fmt and not is_simulated:
            times = step_times_file(config)
            if times is None:
                raise ReplayError(
                    f"{path}: policy slo needs `step_times` (scripts/calibrate.py makes them), or a profile with some."
                )
            try:
                self._check_times(times, load_step_times(times))
            except ValueError as e:
                raise ReplayError(f"{path}: {e}") from e

    def _check_times(self, path: Path, times: StepTimes) -> None:
        """Say in one line that a calibration is of another dtype or tier than the servers will have."""
        dtype, tier = self.server.dtype or model_dtype(self.server.model), cpu_tier.tier()
        if (times.dtype and dtype and times.dtype != dtype) or (times.tier and tier and times.tier != tier):
            log.warning(
                "%s is of %s on tier %s, the servers run %s on tier %s: policy slo will predict other times than they "
                "take until it has learnt. Run scripts/calibrate.py again.",
                path, times.dtype or "?", times.tier or "?", dtype or "?", tier or "?",
            )  # fmt: skip

    def config_of(self, name: str) -> Path:
        """YAML of a run with the plugin.

        Raises:
            ReplayError: there is none.
        """
        path = self.policies.get(name, self.config)
        if path is None:
            raise ReplayError(f"--compare {','.join(self.names)} needs --config with a MorphServe YAML.")
        return path


def static_format(name: str) -> str:
    """The format of an anchor, by the name of its run; empty for other runs."""
    return name.removeprefix(_STATIC) if name.startswith(_STATIC) else ""


def run_all(comparison: Comparison, progress: Progress, done: Sequence[RunResult] = ()) -> list[RunResult]:
    """Run everything, interleaved: a, b, a, b, so that a drift of the machine meets all runs alike.

    Every run is saved as soon as it is measured.

    Args:
        done: the first runs, where they are measured already.

    Raises:
        ReplayError: a server does not start or does not answer.
    """
    comparison.check()
    results = list(done)
    runs = [(name, repeat) for repeat in range(1, comparison.repeats + 1) for name in comparison.names]
    for name, repeat in runs[len(done) :]:
        directory = run_directory(comparison, name, repeat)
        with start_server(comparison, name, progress, directory, run_title(comparison, name, repeat)) as server:
            results.append(measure_on(comparison, name, repeat, server, progress))
    return results


def measure_url(comparison: Comparison, name: str, url: str, progress: Progress) -> list[RunResult]:
    """Measure a server that somebody else started."""
    results = []
    for repeat in range(1, comparison.repeats + 1):
        directory = run_directory(comparison, name, repeat)
        result = measure_run(comparison, name, repeat, directory, url, {"url": url}, progress)
        result.save()
        progress.finished(result)
        results.append(result)
    return results


def derived_config(base: Path, name: str, directory: Path, promise: Slo | None = None) -> dict[str, Any]:
    """The YAML of a run: as given, a static policy for the anchors, logs in the run's own directory.

    Args:
        promise: what a policy of kind slo is to keep; None = what the YAML says.

    Raises:
        ConfigError: a config that MorphServe would refuse.
    """
    load_config(base)  # its errors name the user's file, not ours
    raw = yaml.safe_load(base.expanduser().read_text(encoding="utf-8")) or {}
    if fmt := static_format(name):
        raw["policy"] = {"kind": "static", "level": fmt}
    elif promise is not None and (raw.get("policy") or {}).get("kind") == "slo":
        raw["policy"] = {**raw["policy"], "ttft_s": promise.ttft_s, "tpot_s": promise.tpot_s}
    if raw.get("decision_log"):
        raw["decision_log"] = str((directory / "decisions.jsonl").resolve())
    parse_config(raw, source=f"config derived for {name}")
    return dict(raw)


def measure_on(comparison: Comparison, name: str, repeat: int, server: Server, progress: Progress) -> RunResult:
    """One run on a server that was started for it; saved.

    Raises:
        ReplayError: it does not answer.
    """
    directory = run_directory(comparison, name, repeat)
    log.info("%s: up after %.0f s, log %s", name, server.start_s, directory / "server.log")
    setup = {"command": server.command, "server_start_s": round(server.start_s, 1)}
    result = measure_run(comparison, name, repeat, directory, server.url, setup, progress)
    result.save()
    progress.finished(result)
    return result


@contextlib.contextmanager
def start_server(
    comparison: Comparison, name: str, progress: Progress, directory: Path, title: str = ""
) -> Iterator[Server]:
    """The server of a run; its config and its log go into `directory`.

    Raises:
        ReplayError: it does not start.
        ConfigError: a config that MorphServe would refuse.
    """
    directory.mkdir(parents=True, exist_ok=True)
    own_args: tuple[str, ...] = ()
    if name != STOCK:
        config_path = directory / "config.yaml"
        config = derived_config(comparison.config_of(name), name, directory, comparison.promise)
        config_path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        own_args = ("--plugin", "morphserve", "--morphserve-config", str(config_path.resolve()))
    progress.starting(title or name)
    with serve(comparison.server, directory / "server.log", own_args, progress.waiting) as server:
        yield server


def measure_run(
    comparison: Comparison,
    name: str,
    repeat: int,
    directory: Path,
    url: str,
    setup: dict[str, Any],
    progress: Progress,
) -> RunResult:
    """One run on a server that is up.

    Raises:
        ReplayError: it does not answer.
    """
    what = replace(comparison.measurement, client=replace(comparison.measurement.client, url=url))
    if static_format(name):
        what = replace(what, restore_wait_s=0.0)  # it stays where it is
    progress.measuring(run_title(comparison, name, repeat), len(what.workload.requests))
    setup = (comparison.setup or {}) | describe_machine() | setup
    return asyncio.run(measure(what, name, repeat, directory, setup, progress.request_done))


def run_directory(comparison: Comparison, name: str, repeat: int) -> Path:
    """Where a run's files go; made if it is not there."""
    directory = comparison.out / (name if comparison.repeats == 1 else f"{name}.{repeat}")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def run_title(comparison: Comparison, name: str, repeat: int) -> str:
    return name if comparison.repeats == 1 else f"{name} {repeat}/{comparison.repeats}"


def by_name(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Repeats of each run, in the order of their first appearance."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    return groups
