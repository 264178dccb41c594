"""Which vector instructions this CPU has, as five tiers, and the emulation of a lower one.

vLLM's wheel for x86-64 has three builds of its extension and loads the one that fits (vllm/platforms/cpu.py,
`import_kernels`): `_C` from tier bf16 on, `_C_AVX512` for avx512 and vnni, `_C_AVX2` below.

MORPHSERVE_CPU_TIER=avx2 makes a better machine answer as an AVX2 machine does: torch, oneDNN and MKL choose their
kernels by it, vLLM its build, and we ours. The set-up puts a `.pth` file into .venv that calls `emulate` in each
process. An instruction above the tier would still run, so emulation proves which code is taken and not what it was
compiled to.

Standard library only, and quick: it is imported at the start of every emulated process, before torch.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from morphserve.cache import cache_root
from morphserve.errors import ConfigError

VARIABLE = "MORPHSERVE_CPU_TIER"
TIERS = ("avx2", "avx512", "vnni", "bf16", "amx")  # each has all of those before it

# Of /proc/cpuinfo. FMA and F16C came with AVX2, and the four AVX-512 parts together, on all CPUs of servers.
_FLAGS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "avx2": frozenset({"avx2", "fma", "f16c"}),
        "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
        "vnni": frozenset({"avx512_vnni"}),
        "bf16": frozenset({"avx512_bf16"}),
        "amx": frozenset({"amx_tile", "amx_int8", "amx_bf16"}),
    }
)
# What each tier is called where kernels are chosen by an environment variable.
_ATEN = dict(zip(TIERS, ("avx2", "avx512", "avx512", "avx512", "avx512"), strict=True))
_MKL = dict(zip(TIERS, ("AVX2", "AVX512", "AVX512_E1", "AVX512_E3", "AVX512_E4"), strict=True))
_ONEDNN = dict(
    zip(
        TIERS,
        ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_AMX"),
        strict=True,
    )
)


def machine_tier() -> str | None:
    """Return the highest tier whose instructions, and all below, this CPU has; None without AVX2, or not on x86-64."""
    return tier_of(_cpu_flags()) if platform.machine() in ("x86_64", "AMD64") else None


def tier() -> str | None:
    """Return the tier that is emulated, else the machine's.

    Raises:
        ConfigError: MORPHSERVE_CPU_TIER names none, or one above the machine's.
    """
    wanted, have = os.environ.get(VARIABLE), machine_tier()
    if not wanted:
        return have
    possible = TIERS[: TIERS.index(have) + 1] if have else ()
    if wanted not in possible:
        can = f"this CPU can be {', '.join(possible)}" if possible else "this CPU has none of them"
        raise ConfigError(f"{VARIABLE} is {wanted!r}; tiers are {', '.join(TIERS)}, and {can}. Give one it has.")
    return wanted


def lower_tiers() -> tuple[str, ...]:
    """Return the tiers that can be emulated here."""
    found = tier()
    return () if found is None else TIERS[: TIERS.index(found)]


def is_emulated() -> bool:
    """Return whether the CPU could do more than `tier()` says."""
    return tier() != machine_tier()


def best_dtype() -> str:
    """Return the dtype in which vLLM serves a bf16 model fastest on this CPU: `bfloat16` or `float32`.

    Without bf16 instructions (below tier bf16) each bf16 matmul widens its operands: four times slower than fp32 at a
    batch of 32.
    """
    found = tier()
    return "float32" if found is not None and TIERS.index(found) < TIERS.index("bf16") else "bfloat16"


def cpu_name() -> str:
    """Return the name that the CPU gives itself, or 'unknown'."""
    return _cpuinfo("model name") or "unknown"


def tier_of(flags: frozenset[str]) -> str | None:
    """Return the tier of a CPU with these flags of /proc/cpuinfo."""
    found = None
    for name in TIERS:
        if not _FLAGS[name] <= flags:
            break
        found = name
    return found


def emulate() -> None:
    """Make libraries that this process will load choose as on the tier of MORPHSERVE_CPU_TIER. Before torch is loaded.

    Ends the process with exit code 2 and one line where that tier is none or above the machine's: a figure taken then
    would be of another tier than the one asked for.
    """
    try:
        wanted = tier()
    except ConfigError as e:
        sys.stderr.write(f"{e}\n")
        sys.stderr.flush()
        os._exit(2)  # an exception would only end the line of the .pth file
    if wanted is None or not is_emulated():
        return
    os.environ["ATEN_CPU_CAPABILITY"] = _ATEN[wanted]
    os.environ["ONEDNN_MAX_CPU_ISA"] = _ONEDNN[wanted]
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = _MKL[wanted]
    for variable in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):  # compiled code is of a tier
        os.environ.setdefault(variable, str(cache_root() / wanted / variable.lower()))
    if "torch.cpu" in sys.modules:
        _limit(sys.modules["torch.cpu"], wanted)
    else:
        sys.meta_path.insert(0, _TorchCpu(wanted))


class _TorchCpu:
    """An import hook that finds `torch.cpu` once, and limits it as soon as it is loaded."""

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torch.cpu" else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _limit(module, self._wanted)
                sys.meta_path.remove(self)  # not before: somebody may only ask where the module is

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _limit(torch_cpu: Any, wanted: str) -> None:
    """Let torch.cpu answer for a tier. In torch 2.13 all of its questions ask `get_capabilities`."""
    ask = torch_cpu.get_capabilities

    @functools.cache
    def get_capabilities() -> Mapping[str, Any]:
        return MappingProxyType({name: has and not _is_above(name, wanted) if isinstance(has, bool) else has
                                 for name, has in ask().items()})  # fmt: skip

    torch_cpu.get_capabilities = get_capabilities


def _is_above(capability: str, wanted: str) -> bool:
    """Return whether a capability, as torch names it (`avx512_f`, `amx_tile`), is missing on the tier."""
    family, _, part = capability.partition("_")
    if family == "avx512":
        needs = {"vnni": "vnni", "bf16": "bf16", "fp16": "amx"}.get(part, "avx512")
    elif family in ("amx", "avx10") or (family == "avx" and part):  # AVX-VNNI and its kin are younger than AVX-512
        needs = "amx"
    else:
        return False
    return TIERS.index(needs) > TIERS.index(wanted)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """Return what /proc/cpuinfo says of the first CPU, empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
