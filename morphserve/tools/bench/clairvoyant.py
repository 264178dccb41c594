"""The runs of a simulated comparison beside the best that could have been done, by who knows what will come."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from morphserve.config import MorphServeConfig, load_config, parse_config
from morphserve.profile_ladder import read_ladder
from morphserve.tools.bench.comparison import MORPHSERVE, STOCK, Comparison
from morphserve.tools.bench.prepared import with_prepared
from morphserve.tools.bench.simulated import load_engine, sim_server
from morphserve.tools.clairvoyant import SearchOptions, World, find, text_of
from morphserve.tools.options import add_options, given, read_options
from morphserve.tools.workload import ReplayError
from policies import StaticConfig

_ANY = StaticConfig(kind="static")


def clairvoyant_options(group: Any) -> None:
    """Add whether is searched, and for how long."""
    group.add_argument(
        "--clairvoyant",
        action="store_true",
        help="with --simulate: search, knowing the future, the levels by time that cost the least KL at no more late "
        "requests than each run has; in OUT/clairvoyant.md what each run costs beyond that",
    )
    add_options(group, SearchOptions)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be searched for, and what would be ignored.

    Raises:
        ReplayError: names the option.
        ConfigError: there is nothing to search with.
    """
    if not args.clairvoyant:
        if found := list(given(args, SearchOptions)):
            raise ReplayError(f"{', '.join(found)} is of a search. Add --clairvoyant, or leave it out.")
        return
    if not args.simulate:
        raise ReplayError("--clairvoyant searches in virtual time. Use `morphserve simulate`, or add --simulate.")
    if args.config is None:
        raise ReplayError("--clairvoyant needs --config with a MorphServe YAML: its ladder is searched.")
    if args.repeats != 1:
        raise ReplayError(
            f"--repeats is {args.repeats}: --clairvoyant knows one future, that of --seed. Leave --repeats out."
        )
    read_options(SearchOptions, args)


def find_best(args: argparse.Namespace, comparison: Comparison) -> dict[str, Any]:
    """Search; write OUT/clairvoyant.md, and return the findings for JSON.

    Raises:
        ReplayError, ConfigError: see `searched`.
    """
    world, policies = searched(args, comparison)
    options = read_options(SearchOptions, args)
    if not args.quiet:
        sys.stderr.write(f"searching, knowing the future: {options.clairvoyant_runs} runs\n")
    transitions = logging.getLogger("morphserve.control")
    level = transitions.level
    transitions.setLevel(logging.ERROR)  # a schedule that asks for what has no room is a run like any other
    try:
        findings = find(world, policies, options, args.seed)
    finally:
        transitions.setLevel(level)
    text = text_of(findings)
    (comparison.out / "clairvoyant.md").write_text(text, encoding="utf-8")
    if not args.quiet:
        sys.stderr.write(text)
    return findings.document()


def searched(args: argparse.Namespace, comparison: Comparison) -> tuple[World, dict[str, MorphServeConfig | None]]:
    """Return what is searched, and the policies beside it by name; None = stock vLLM.

    Raises:
        ReplayError: a run's config differs from `--config` in more than its policy.
        ConfigError: a level's quality cost was never measured.
    """
    what, engine = comparison.measurement, load_engine(args)
    server = sim_server(comparison.server, what, engine.step_noise)
    base = with_prepared(load_config(comparison.config_of(MORPHSERVE)), engine.calibration, server)
    policies: dict[str, MorphServeConfig | None] = {}
    for name in comparison.names:
        if name == STOCK:
            policies[name] = None
            continue
        raw = comparison.derived(name, comparison.out / name)
        raw.pop("decision_log", None)  # the run that is reported writes it
        config = with_prepared(parse_config(raw, source=f"config of {name}"), engine.calibration, server)
        if differing := _differing(config, base):
            raise ReplayError(
                f"--clairvoyant: {name} differs from --config in {', '.join(differing)}, so that its levels are not "
                "those that are searched. Compare it with a --config that has the same."
            )
        policies[name] = config
    profile = read_ladder(base)
    world = World(what.workload, server, base, engine.calibration, what.slo, engine.speed, engine.seed, profile)
    return world, policies


def _differing(config: MorphServeConfig, base: MorphServeConfig) -> list[str]:
    """Return the sections, but for the policy's, in which a config differs."""
    own, other = (
        each.model_copy(update={"policy": _ANY, "step_times": None, "decision_log": None}).model_dump()
        for each in (config, base)
    )
    return [name for name, value in own.items() if value != other[name]]
