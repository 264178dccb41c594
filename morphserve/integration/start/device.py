"""What vLLM serves on here, asked in this one place: where layers and KV have their bytes, and what that means."""

from __future__ import annotations

import logging
import os
import platform

from morphserve import cpu_tier
from morphserve.errors import ConfigError
from morphserve.residence import Residence, residence_of
from morphserve.version import PROVEN_GPUS, UNPROVEN_CUDA

logger = logging.getLogger("vllm.morphserve")


def device_type() -> str:
    """Return the type of the device that vLLM has found; of a platform that borrows a type, as ROCm does, its name."""
    from vllm.platforms import current_platform as found

    borrowed = {"cuda": not found.is_cuda(), "cpu": not found.is_cpu()}
    return str(found.device_name if borrowed.get(found.device_type) else found.device_type)


def is_cuda() -> bool:
    """Return whether vLLM serves on NVIDIA GPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def serving_residence() -> type[Residence]:
    """Return what holds layers and KV on the device that vLLM has found.

    Raises:
        ConfigError: nothing does.
    """
    found = residence_of(device_type())
    if found is None:
        raise ConfigError(
            f"device {device_type()!r}: MorphServe morphs on CPUs and on NVIDIA GPUs. Start without --plugin "
            "morphserve on this device."
        )
    return found


def check_platform(num_ranks: int = 1) -> None:
    """Refuse a device that MorphServe cannot morph on.

    Args:
        num_ranks: of an engine.

    Raises:
        ConfigError: says which device vLLM has found.
    """
    serving_residence()
    if device_type() == "cpu" and cpu_tier.machine_tier() is None:
        raise ConfigError(
            f"this CPU ({platform.machine()}) is no x86-64 with AVX2, for which MorphServe's kernels are made and "
            "tested. Start without --plugin morphserve on this machine."
        )
    if is_cuda() and os.environ.get(UNPROVEN_CUDA) != "1":
        _check_proven(num_ranks)


def _check_proven(num_ranks: int) -> None:
    import torch
    import vllm
    from vllm.platforms import current_platform

    name = current_platform.get_device_name()
    for gpu, of_vllm, of_torch in PROVEN_GPUS:
        # A slice of a GPU is called after it, and so are its slower kin: "NVIDIA H200 MIG 1g.18gb", "NVIDIA H200 NVL".
        if num_ranks == 1 and name == gpu and vllm.__version__.startswith(of_vllm + "."):
            if not torch.__version__.startswith(of_torch + "."):
                logger.warning(
                    "morphserve: proven on this GPU with torch %s, this is %s; `morphserve gpu-check` tries it",
                    of_torch, torch.__version__,
                )  # fmt: skip
            return
    proven = " or ".join(f"one {gpu} with vLLM {version}" for gpu, version, _ in PROVEN_GPUS)
    raise ConfigError(
        f"device 'cuda': MorphServe has not been proven on {num_ranks} x {name} with vLLM {vllm.__version__}, only on "
        f"{proven}; `morphserve gpu-check` tries what it needs of one. Set {UNPROVEN_CUDA}=1 to try it, or start "
        "without --plugin morphserve."
    )


def default_formats() -> tuple[str, ...]:
    """Return the formats of the ladder that nobody wrote down; none where the settings' own default holds.

    Half the bytes at little cost come before 4 bits: fp8 on a GPU that multiplies it, else int8 weights, where Marlin
    runs.
    """
    from vllm.platforms import current_platform

    if not is_cuda():
        return ()
    if current_platform.has_device_capability(89):
        return ("fp8", "w4")
    return ("w8", "w4") if current_platform.has_device_capability(75) else ("w4",)
