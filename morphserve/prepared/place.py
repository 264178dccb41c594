"""Where, and how, a model is served: all that its step times depend on."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from morphserve import cpu_tier

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True, slots=True)
class Place:
    """One way to serve on one kind of machine. Figures of step times hold where all of it is the same."""

    device: str  # name of the CPU or the GPU
    tier: str  # of the CPU, emulated or not; empty on a GPU
    cores: str  # that compute, see `bound_cores`; empty on a GPU
    dtype: str  # of activations, as bfloat16
    tensor_parallel: int
    pipeline_parallel: int
    compiled: bool
    vllm: str  # version

    @property
    def is_cpu(self) -> bool:
        """Whether it is a CPU."""
        return bool(self.tier)

    def differences(self, other: Place) -> list[str]:
        """Return what differs, as 'dtype float32 instead of bfloat16': of the other, instead of this one's."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{key} {theirs[key]} instead of {value}" for key, value in mine.items() if theirs[key] != value]


def this_machine(bound: str | None = None) -> dict[str, str]:
    """Return `device`, `tier` and `cores` of a `Place` on this CPU; `bound` as of `bound_cores`.

    Raises:
        ConfigError: MORPHSERVE_CPU_TIER names no tier of this machine.
    """
    return {"device": cpu_tier.cpu_name(), "tier": cpu_tier.tier() or "", "cores": bound_cores(bound)}


def bound_cores(bound: str | None = None) -> str:
    """Return how many cores each rank is bound to, as vLLM reads it: '1', '2|2', or 'auto of 8'.

    Args:
        bound: what VLLM_CPU_OMP_THREADS_BIND will be; None = what it is.
    """
    bound = bound or os.environ.get(_BIND) or "auto"
    try:
        return "|".join(str(len(set(_ids(rank)))) for rank in bound.split("|"))
    except ValueError:  # auto, nobind
        return f"{bound} of {len(os.sched_getaffinity(0))}"


def vllm_version() -> str:
    """Return the installed vLLM's version; empty where there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _ids(cores: str) -> Iterator[int]:
    for part in cores.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
