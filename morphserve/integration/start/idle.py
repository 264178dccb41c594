"""`prepare: when_idle`: what of a model is missing, and the command by which a server's child makes it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from morphserve.config import MorphServeConfig
from morphserve.hub import local_files
from morphserve.integration.start.device import is_cuda
from morphserve.integration.start.prepared import READABLE
from morphserve.integration.start.settings import FOUND, settings_of, with_prepared
from morphserve.prepared import Place, weights_fingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Of the server, and of no use or harm to an engine beside it: where its own processes write how they end, and metrics.
_OWN_VARIABLES = ("MORPHSERVE_ENDING_FILE", "PROMETHEUS_MULTIPROC_DIR")
# For the child: the least of a KV cache; and no import of what lies in the directory in which the server was started.
_CHILDS_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONSAFEPATH": "1"}


@dataclass(frozen=True, slots=True)
class IdleWork:
    """What a server with `prepare: when_idle` can do about its model.

    Attributes:
        command: words; none where there is nothing to do.
        environment: of the command.
        why_not: there is nothing, in a sentence.
        is_missing: though something is missing.
    """

    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str = ""
    is_missing: bool = False


def idle_work(vllm_config: VllmConfig) -> IdleWork | None:
    """Return what there is to do when the server is idle; None where nobody asked for it.

    It is the profile. Step times need the cores, or the device, to themselves: the server learns them from its own
    steps, which nothing beside it could time better.

    Raises:
        ConfigError: the settings cannot be read.
    """
    config = settings_of(vllm_config)
    if config is None or config.prepare is None:
        return None
    if with_prepared(config, vllm_config).profile is not None:
        return IdleWork(why_not="the profile is there")
    why_not = _obstacle(vllm_config)
    model = vllm_config.model_config
    directory = None if why_not else local_files(model.model, model.revision)
    if not why_not and (directory is None or weights_fingerprint(directory) is None):
        why_not = f"the files of {model.model} are not on this machine, or are no safetensors"
    if why_not:
        remedy = f"Run `morphserve prepare {model.model}` while it is down, where that can be done."
        return IdleWork(why_not=f"{why_not}. {remedy}", is_missing=True)
    environment = {key: value for key, value in os.environ.items() if key not in _OWN_VARIABLES}
    place: Place = getattr(vllm_config, FOUND).place
    return IdleWork(_command(str(directory), place, config, vllm_config), environment | _CHILDS_VARIABLES)


def _obstacle(vllm_config: VllmConfig) -> str:
    """Return why a second engine beside this one could not make a profile; '' if it could."""
    for bad, what in (
        (is_cuda(), "the device's memory is this server's, so no second engine measures levels beside it"),
        (vllm_config.model_config.quantization is not None, "a quantized base has no profile"),
        (vllm_config.lora_config is not None, "with LoRA there is no profile"),
        (
            str(vllm_config.load_config.load_format) not in READABLE,
            f"load format {vllm_config.load_config.load_format}: the files are not the weights",
        ),
        (
            getattr(vllm_config.parallel_config, "_api_process_count", 1) > 1,
            "several API servers do not know of each other's requests in time",
        ),
    ):
        if bad:
            return what
    return ""


def _command(directory: str, place: Place, config: MorphServeConfig, vllm_config: VllmConfig) -> tuple[str, ...]:
    words = [sys.executable, "-m", "morphserve.tools.prepare.beside_server", str(os.getpid()), directory]
    words += ["--without-times", "--dtype", place.dtype, "--cache-dir", str(config.cache_dir)]
    words += ["-tp", str(place.tensor_parallel), "-pp", str(place.pipeline_parallel)]
    words += ["--max-model-len", str(vllm_config.model_config.max_model_len)]
    return (*words, *([] if place.compiled else ["--enforce-eager"]))
