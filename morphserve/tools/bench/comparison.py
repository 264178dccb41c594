"""Which runs are compared, on what workload, with which settings; and what cannot be compared."""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from morphserve import cpu_tier
from morphserve.config import load_config, parse_config, step_times_file
from morphserve.control import ladder_formats
from morphserve.serve_dtype import model_dtype
from morphserve.shipped import DEFAULT_CONFIG, config_file
from morphserve.tools.bench.load.measure import Measurement
from morphserve.tools.bench.load.server import ServerOptions
from morphserve.tools.options import option
from morphserve.tools.workload import ReplayError, Slo
from morphserve.user_input import read_yaml, user_path
from policies import StepTimes, load_step_times

log = logging.getLogger(__name__)

STOCK, MORPHSERVE = "stock", "morphserve"
STATIC = "static_"  # before the format that all layers of a baseline have
_PROMISE = ("ttft_s", "tpot_s")  # keys of a policy of kind slo
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")  # a directory is called by it


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _named_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=YAML")
    return name, config_file(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Which runs, how often, with what."""

    names: tuple[str, ...] = option(
        "comma-separated: stock, morphserve, static_FORMAT (static_w8: all layers always in w8), --policy names",
        default=(STOCK,),
        flag="--compare",
        type=_names,
        metavar="RUNS",
    )
    # The static runs derive theirs from it.
    config: Path | None = option(
        "MorphServe config of the morphserve run and the static baselines; default: as with no settings at all",
        default=None,
        type=config_file,
        metavar="YAML",
    )
    policies: tuple[tuple[str, Path], ...] = option(
        "one more MorphServe config, a run by that name in --compare; repeatable",
        default=(),
        flag="--policy",
        type=_named_file,
        action="append",
        metavar="NAME=YAML",
    )
    out: Path = option("where the report goes", default=Path(), unset=True, type=Path, metavar="DIR")
    repeats: int = option("interleaved; the summary gives medians and the spread", default=1)
    server: ServerOptions
    measurement: Measurement  # its client.url is set per server
    promise: Slo | None = None  # what policies of promises keep; None = their YAML's, else what requests are judged by
    setup: dict[str, Any] = field(default_factory=dict)  # recorded with every run
    window: str = ""  # of a sweep: its name; another call may add to its repeats

    def check(self, is_simulated: bool = False) -> None:
        """Refuse before the first server starts what would fail at the second.

        Args:
            is_simulated: step times come from elsewhere.

        Raises:
            ReplayError: unknown or repeated run names, a format or step times that are not there.
            ConfigError: a config that MorphServe would refuse.
        """
        own = [name for name, _ in self.policies]
        if len(set(own)) < len(own):
            raise ReplayError(f"--policy {', '.join(own)}: give each name once.")
        if taken := [n for n in own if n in (STOCK, MORPHSERVE) or static_format(n) or not _NAME.match(n)]:
            raise ReplayError(
                f"--policy {', '.join(taken)}: a name is of letters, digits, '.', '_' and '-', and none of {STOCK}, "
                f"{MORPHSERVE} and {STATIC}FORMAT."
            )
        known = (STOCK, MORPHSERVE, *own)
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
        if config.policy.kind == "slo" and not fmt and self.promise is None and path != DEFAULT_CONFIG:
            kept, slo = config.policy, self.measurement.slo
            for key, own, judged in zip(_PROMISE, (kept.ttft_s, kept.tpot_s), (slo.ttft_s, slo.tpot_s), strict=True):
                if key in kept.model_fields_set and own != judged:
                    log.warning("%s promises %s: %g, and requests are judged by %g.", path, key, own, judged)
        predicts = config.policy.kind == "slo" and not fmt and not is_simulated
        if predicts and (times := step_times_file(config)) is not None:
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
                "take until it has learnt. Run `morphserve calibrate` again.",
                path, times.dtype or "?", times.tier or "?", dtype or "?", tier or "?",
            )  # fmt: skip

    def config_of(self, name: str) -> Path:
        """Return the YAML of a run with the plugin: what a server without one does, where the user gave none."""
        return dict(self.policies).get(name, self.config or DEFAULT_CONFIG)

    def derived(self, name: str, directory: Path) -> dict[str, Any]:
        """Return the config of a run whose files are in `directory`; empty for stock.

        Raises:
            ConfigError: MorphServe would refuse it.
        """
        if name == STOCK:
            return {}
        return derived_config(self.config_of(name), name, directory, self.promise, self.measurement.slo)

    def write_config(self, name: str, directory: Path) -> Path | None:
        """Make `directory` with the config of a run in it, and return the file; None for stock, which has no config.

        Raises:
            ConfigError: see `derived`.
        """
        config = self.derived(name, directory)
        directory.mkdir(parents=True, exist_ok=True)
        if name == STOCK:
            return None
        path = directory / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path


def static_format(name: str) -> str:
    """Return the format of a baseline, by the name of its run; empty for other runs."""
    return name.removeprefix(STATIC) if name.startswith(STATIC) else ""


def derived_config(
    base: Path, name: str, directory: Path, promise: Slo | None = None, judged_by: Slo | None = None
) -> dict[str, Any]:
    """Return the YAML of a run: as given, a static policy for the baselines, logs in the run's own directory.

    Args:
        base: as given.
        name: of the run.
        directory: of its files.
        promise: what a policy of kind slo keeps, whatever the YAML says.
        judged_by: what it keeps where there is no `promise` and the YAML says nothing.

    Raises:
        ConfigError: a config that MorphServe would refuse.
    """
    load_config(base)  # its errors name the user's file, not ours
    raw = read_yaml(user_path(base), "--config") or {}
    policy = raw.get("policy") or {"kind": "slo"}
    if fmt := static_format(name):
        raw["policy"] = {"kind": "static", "level": fmt}
    elif policy.get("kind") == "slo" and (promise or judged_by):
        if base == DEFAULT_CONFIG:  # it stands for no settings, and has all keys
            policy = {key: value for key, value in policy.items() if key not in _PROMISE}
        raw["policy"] = {**_promised(judged_by), **policy, **_promised(promise)}
    if raw.get("decision_log"):
        packed = ".gz" if str(raw["decision_log"]).endswith(".gz") else ""
        raw["decision_log"] = str((directory / f"decisions.jsonl{packed}").resolve())
    parse_config(raw, source=f"config derived for {name}")
    return dict(raw)


def _promised(slo: Slo | None) -> dict[str, float]:
    return {} if slo is None else dict(zip(_PROMISE, (slo.ttft_s, slo.tpot_s), strict=True))
