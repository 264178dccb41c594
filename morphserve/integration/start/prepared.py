"""At start: what was prepared for this very model, served as it will be served here. Never another's.

Asked once an engine, where its config is made; what was found travels with the config, beside all that vLLM hashes for
its compile cache. So all processes of the engine agree, also when somebody prepares meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from morphserve.config import MorphServeConfig, step_times_file
from morphserve.control import DEFAULT_FORMATS, ladder_formats
from morphserve.hub import local_files
from morphserve.integration.start.device import default_formats, is_cuda
from morphserve.integration.start.settings import FOUND, for_this_device, read_settings, with_found
from morphserve.prepared import (
    Place,
    ProfileKey,
    Store,
    StoredProfile,
    newest,
    this_machine,
    vllm_version,
    weights_fingerprint,
)
from morphserve.profile_ladder import read_ladder
from policies import BASE_FORMAT

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.morphserve")

_READABLE = ("auto", "safetensors", "hf")  # load formats with which the files are the weights


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was found for an engine.

    Attributes:
        place: where, and how, it serves.
        profile: directory; None = there is none for it, or the settings name one.
        variants: format |-> the checkpoint that the profile was measured with.
        step_times: file; None as for `profile`.
    """

    place: Place
    profile: Path | None = None
    variants: Mapping[str, str] = field(default_factory=dict)
    step_times: Path | None = None


@dataclass(slots=True)
class _Findings:
    """What is said of it, in one line each."""

    used: list[str] = field(default_factory=list)
    not_used: list[str] = field(default_factory=list)


def attach_prepared(vllm_config: VllmConfig) -> None:
    """Look up what was prepared, say what was found, and leave it with the config. Raises nothing of its own."""
    config = read_settings(vllm_config.additional_config)
    if config is None:
        return
    place = place_of(vllm_config)
    found = Prepared(place)
    if config.prepared:
        findings = _Findings()
        try:
            found = _find(config, vllm_config, place, findings)
        except Exception as e:  # a cache that somebody else has made of: the server is to start
            findings.not_used.append(f"what was prepared cannot be read ({type(e).__name__}: {e})")
        _say(vllm_config.model_config.model, findings)
    setattr(vllm_config, FOUND, found)


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


def _find(config: MorphServeConfig, vllm_config: VllmConfig, place: Place, findings: _Findings) -> Prepared:
    model = vllm_config.model_config
    is_read = str(vllm_config.load_config.load_format) in _READABLE
    directory = local_files(model.model, model.revision) if is_read else None
    weights = None if directory is None else weights_fingerprint(directory)
    if weights is None:
        return Prepared(place)
    store = Store(config.cache_dir, weights)
    found = Prepared(place)
    plain = model.quantization is None and vllm_config.lora_config is None
    if config.profile is None and plain:
        found = _with_profile(found, config, store, model.get_total_num_hidden_layers(), findings)
    if step_times_file(config) is None:
        found = _with_times(found, config, vllm_config, store, findings)
    findings.not_used += store.problems
    return found


def _with_profile(
    found: Prepared, config: MorphServeConfig, store: Store, num_layers: int, findings: _Findings
) -> Prepared:
    place = found.place
    wanted = ProfileKey(default_formats() or DEFAULT_FORMATS, place.dtype, place.tier)
    other: dict[str, list[str]] = {}
    fitting: list[StoredProfile] = []
    for each in store.profiles():
        differences = each.differences(wanted) + _unfit(each, config, num_layers)
        if differences:
            other[str(each.directory)] = differences
        else:
            fitting.append(each)
    exact = [each for each in fitting if (each.key.dtype, each.key.tier) == (place.dtype, place.tier)]
    own = [each for each in exact or fitting if each.directory.parent == store.directory]
    chosen = newest(own or exact or fitting)
    if chosen is None:
        findings.not_used += [f"profile {path}: {', '.join(differences)}" for path, differences in other.items()]
        return found
    bound = "" if exact else f"; its KL was measured in {chosen.key.dtype} on tier {chosen.key.tier}: less is lost here"
    findings.used.append(f"the profile of {chosen.when} ({chosen.directory}{bound})")
    variants = {fmt: path for fmt, path in chosen.variants.items() if fmt not in config.variants}
    return Prepared(place, chosen.directory, variants, found.step_times)


def _unfit(profile: StoredProfile, config: MorphServeConfig, num_layers: int) -> list[str]:
    named = [fmt for fmt in profile.key.formats if fmt in config.variants]
    found = [f"measured without {fmt} from {config.variants[fmt]}" for fmt in named]
    if profile.num_layers != num_layers:
        found.append(f"{profile.num_layers} layers instead of {num_layers}")
    return found + [f"its {path} is gone" for path in profile.variants.values() if not Path(path).is_dir()]


def _with_times(
    found: Prepared, config: MorphServeConfig, vllm_config: VllmConfig, store: Store, findings: _Findings
) -> Prepared:
    times = store.times()
    here = newest([each for each in times if each.place == found.place])
    if here is None:
        if times:
            nearest = min(times, key=lambda each: len(found.place.differences(each.place)))
            findings.not_used.append(
                f"step times {nearest.file}: {', '.join(found.place.differences(nearest.place))}"
            )
        return found
    served = for_this_device(with_found(config, found), vllm_config)
    halves = {half for fmt in ladder_formats(served.ladder, read_ladder(served)) for half in fmt.split("/")}
    if lacking := sorted(halves - {BASE_FORMAT, *here.formats}):
        findings.not_used.append(f"step times {here.file}: none of {', '.join(lacking)}, which the ladder has")
        return found
    findings.used.append(f"the step times of {here.when} ({here.file})")
    return Prepared(found.place, found.profile, found.variants, here.file)


def _say(model: str, findings: _Findings) -> None:
    remedy = f"`morphserve prepare {model}`"
    if findings.used:
        logger.info("morphserve: was prepared, and uses %s.", " and ".join(findings.used))
    if findings.not_used:
        logger.warning(
            "morphserve: not used, as it is not of this model as it is served here, or damaged: %s. Run %s with the "
            "options of this server to have its own; `prepared: false` looks for none.",
            "; ".join(findings.not_used), remedy,
        )  # fmt: skip
    elif not findings.used:
        logger.info("morphserve: nothing was prepared for this model here; %s measures once what it loses.", remedy)
