"""At start: what was prepared for this very model, served as it will be served here. Never another's.

Asked once an engine, where its config is made; what was found travels with the config, beside all that vLLM hashes for
its compile cache. So all processes of the engine agree, also when somebody prepares meanwhile.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from morphserve.config import MorphServeConfig, step_times_file
from morphserve.errors import ConfigError
from morphserve.hub import local_files
from morphserve.integration.start.device import is_cuda
from morphserve.integration.start.settings import FOUND, STATED, for_this_device, formats_over, read_settings
from morphserve.prepared import (
    Findings,
    Place,
    Prepared,
    Store,
    find_prepared,
    this_machine,
    vllm_version,
    weights_fingerprint,
)
from policies import load_step_times

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.morphserve")

READABLE = ("auto", "safetensors", "hf")  # load formats with which the files are the weights


def attach_prepared(vllm_config: VllmConfig) -> None:
    """Look up what was prepared, say what was found, and leave it with the config, and with the settings.

    Raises:
        ConfigError: the settings, or MORPHSERVE_CPU_TIER, cannot be read.
    """
    config = read_settings(vllm_config.additional_config)
    if config is None:
        return
    setattr(vllm_config, STATED, config)
    found = Prepared(place_of(vllm_config))
    if config.prepared:
        findings = Findings()
        try:
            found = _find(config, vllm_config, found.place, findings)
        except Exception as e:  # whatever somebody has made of the cache: the server is to start
            findings.not_used.append(f"the cache directory ({type(e).__name__}: {e})")
        if found.profile is not None or found.step_times is not None:
            found = _if_it_fits(found, config, vllm_config, findings)
        findings.say(logger, vllm_config.model_config.model)
    setattr(vllm_config, FOUND, found)
    _warn_of_other_times(config, found.place)


def _if_it_fits(found: Prepared, config: MorphServeConfig, vllm_config: VllmConfig, findings: Findings) -> Prepared:
    """Return what was found, or nothing of it where these settings cannot be served with it: a level that they name."""
    from morphserve.integration.start.checks import check_levels  # torch: only where something was found

    setattr(vllm_config, FOUND, found)
    try:
        check_levels(for_this_device(config, vllm_config), vllm_config)
    except ConfigError as e:
        findings.not_used.append(f"{' and '.join(findings.used)} (with which these settings do not fit: {e})")
        findings.used.clear()
        return Prepared(found.place)
    return found


def _warn_of_other_times(config: MorphServeConfig, place: Place) -> None:
    """Say so when the settings name step times of another machine, dtype, tier or cores: nobody has looked them up."""
    file = step_times_file(config)
    if file is None or config.policy.kind != "slo":
        return
    with suppress(ValueError):  # unreadable ones are refused where the policy is built
        times = load_step_times(file)
        here = {"machine": place.device, "dtype": place.dtype, "tier": place.tier, "cores": place.cores}
        own = {key: known for key in here if (known := getattr(times, key))}
        if other := [f"{key} {known} instead of {here[key]}" for key, known in own.items() if known != here[key]]:
            logger.warning(
                "morphserve: the step times %s are of %s: predictions are wrong until the engine's own steps have "
                "corrected them. `morphserve calibrate` makes them here; without any they are learned.",
                file, ", ".join(other),
            )  # fmt: skip


def place_of(vllm_config: VllmConfig) -> Place:
    """Return where, and how, an engine serves. Before a worker has bound this process to cores."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    device = {"device": current_platform.get_device_name(), "tier": "", "cores": ""} if is_cuda() else this_machine()
    parallel = vllm_config.parallel_config
    return Place(
        **device,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        compiled=vllm_config.compilation_config.mode != CompilationMode.NONE,
        vllm=vllm_version(),
    )


def _find(config: MorphServeConfig, vllm_config: VllmConfig, place: Place, findings: Findings) -> Prepared:
    model = vllm_config.model_config
    is_read = str(vllm_config.load_config.load_format) in READABLE
    directory = local_files(model.model, model.revision) if is_read else None
    weights = None if directory is None else weights_fingerprint(directory)
    if weights is None:
        return Prepared(place)
    findings.with_profile = model.quantization is None and vllm_config.lora_config is None
    return find_prepared(
        config,
        Store(config.cache_dir, weights),
        place,
        formats_over(model),
        model.get_total_num_hidden_layers(),
        findings,
    )
