"""What was prepared for a model, for those who simulate it: what they simulate is then what serves."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from morphserve.config import MorphServeConfig
from morphserve.control import DEFAULT_FORMATS
from morphserve.errors import ConfigError
from morphserve.hub import local_files
from morphserve.prepared import (
    Findings,
    Place,
    Store,
    find_prepared,
    find_times,
    this_machine,
    vllm_version,
    weights_fingerprint,
)
from morphserve.profile_ladder import read_ladder
from morphserve.serve_dtype import model_dtype
from morphserve.tools.sim import Calibration, SimServer, plan_ladder
from policies import BASE_FORMAT, EngineLimits, PolicySetup

log = logging.getLogger(__name__)


def with_prepared(config: MorphServeConfig, calibration: Calibration, server: SimServer) -> MorphServeConfig:
    """Return the settings with the profile that a server would find, of the model that was calibrated.

    Step times stay those that the simulation was given. A profile with a format that they lack is left out, and as on
    a server one whose levels do not fit the settings.
    """
    if not config.prepared or not calibration.weights or config.profile is not None:
        return config
    times = calibration.times
    place = Place(times.machine, times.tier, "", times.dtype, 1, 1, compiled=True, vllm="")
    store = Store(config.cache_dir, calibration.weights)
    config_of = config.model_copy(update={"step_times": Path()})  # not asked for
    findings = Findings()
    found = find_prepared(config_of, store, place, DEFAULT_FORMATS, calibration.num_layers, findings)
    if found.profile is None or {BASE_FORMAT, *DEFAULT_FORMATS} - times.formats.keys():
        return config
    filled = found.fill(config)
    if why := _misfit(filled, calibration, server):
        _warn_once(f"not used: {' and '.join(findings.used)} (with which these settings do not fit: {why})")
        return config
    log.info("simulated with %s", " and ".join(findings.used))
    return filled


def _misfit(config: MorphServeConfig, calibration: Calibration, server: SimServer) -> str:
    """Return why the settings cannot be served with the profile in them; empty where they can."""
    limits = EngineLimits(server.block_size, server.max_num_seqs, server.max_num_batched_tokens)
    try:
        PolicySetup(config.policy, None, limits).build(plan_ladder(config, server, calibration, read_ladder(config)))
    except (ConfigError, ValueError) as e:
        return str(e)
    return ""


@cache
def _warn_once(what: str) -> None:
    """Say it for the first of many simulated runs."""
    log.warning("%s", what)


def stored_times(
    cache_dir: Path, model: str, dtype: str | None, *, enforce_eager: bool, cpu_bind: str | None = None
) -> Path | None:
    """Return the step times that `morphserve prepare` has taken of a model on this machine, of a lone rank.

    Those of other cores than asked for are taken where there are none of these, with a WARNING: prepare leaves the
    cores to vLLM, and a replay's server has one.

    Args:
        cache_dir: of the settings.
        model: directory or hub name.
        dtype: of the server; None = the model's own.
        enforce_eager: not compiled.
        cpu_bind: cores of the engine; None = as this process's environment says.
    """
    directory = local_files(model)
    weights = None if directory is None else weights_fingerprint(directory)
    if weights is None:
        return None
    own = dtype or model_dtype(str(directory)) or ""
    asked, by_default = (
        Place(**this_machine(cores), dtype=own, tensor_parallel=1, pipeline_parallel=1,
              compiled=not enforce_eager, vllm=vllm_version())
        for cores in (cpu_bind, None)
    )  # fmt: skip
    store, findings = Store(cache_dir, weights), Findings()
    if (found := find_times(store, asked, findings)) is not None:
        return found.file
    if (found := find_times(store, by_default, Findings())) is not None:
        log.warning(
            "simulated with step times of cores %s, not %s: nobody has timed these. `morphserve calibrate --cpu-bind` "
            "times them.", by_default.cores, asked.cores,
        )  # fmt: skip
        return found.file
    for why in findings.not_used:
        log.warning("not used: %s", why)
    return None