"""Which machine the figures are of, and its clocks before and after each part. Loads neither torch nor CUDA."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
from typing import Any

from morphserve.tools.machine import describe_machine

_TIMEOUT_S = 10.0
_PACKAGES = ("triton", "cuda-bindings", "flash-attn", "numpy")  # beside torch, vLLM and ours
_FACTS = {"gpu": "name", "driver": "driver_version", "gpu_memory_mib": "memory.total", "sm_max_mhz": "clocks.max.sm"}
_UNKNOWN_BYTES = 80 << 30
_TEXTS = ("gpu", "driver")  # 580.20 and 580.2 are two drivers
_SENSORS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "memory_used_mib": "memory.used",
}


def missing_device() -> str | None:
    """Return why there is no NVIDIA device to measure, or None."""
    smi = _smi("-L")
    if smi is not None and "GPU" in smi:
        return None
    # In a container the tool may be absent where the driver is not.
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA device: nvidia-smi lists none, and there is no libcuda.so.1"
    count = ctypes.c_int(0)
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        return f"no NVIDIA device: the driver answers error {code}"
    return None if count.value else "no NVIDIA device: the driver lists none"


def describe_host() -> dict[str, Any]:
    """GPU, driver, processor and versions; what cannot be found out is left out."""
    return _query(_FACTS) | describe_machine(*_PACKAGES) | {"kernel": platform.release()}


def device_bytes() -> int:
    """Return the memory of the GPU that is listed first; 80 GiB where nothing can be asked."""
    mib = _query({"mib": _FACTS["gpu_memory_mib"]}).get("mib")
    return int(mib * 2**20) if isinstance(mib, float) else _UNKNOWN_BYTES


def read_sensors() -> dict[str, Any]:
    """Clocks, temperature and power of the first GPU, as far as they can be read."""
    return _query(_SENSORS)


def torch_facts() -> dict[str, Any]:
    """Return what torch knows of the device, in a process that has loaded it anyway."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {}
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
        }
    return facts


def _query(fields: dict[str, str]) -> dict[str, Any]:
    answer = _smi(f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits")
    if answer is None or not answer.strip():
        return {}
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    if len(values) != len(fields):
        return {}
    read = {key: value for key, value in zip(fields, values, strict=True) if not value.startswith("[")}
    return {key: value if key in _TEXTS else _number(value) for key, value in read.items()}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _smi(*arguments: str) -> str | None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    try:
        done = subprocess.run([smi, *arguments], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
