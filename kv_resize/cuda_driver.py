"""The CUDA driver of one device, through NVIDIA's `cuda-bindings`, in the context that torch works in.

The bindings are imported when a driver is asked for, so this module loads without them and without a device.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from kv_resize.errors import PageError

_REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "The device is out of memory: ask for fewer pages, or leave more of it free.",
    "CUDA_ERROR_INVALID_CONTEXT": "The thread's CUDA context was replaced or reset. Make the allocator after that.",
    "CUDA_ERROR_INVALID_DEVICE": "Check CUDA_VISIBLE_DEVICES and the device's number.",
    "CUDA_ERROR_NO_DEVICE": "Check CUDA_VISIBLE_DEVICES, and what nvidia-smi lists.",
    "CUDA_ERROR_NOT_SUPPORTED": "This device or its driver has no virtual memory management. Use another one.",
    "CUDA_ERROR_NOT_PERMITTED": "This process may not manage the device's memory. Check its container's permissions.",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "A kernel touched what is not mapped, and the context is lost. Restart the process.",
}
_OTHER_REMEDY = "cuda.h says what that means; what an earlier kernel did wrong shows here too."


class CudaDriver:
    """The calls of the driver, on the device's primary context.

    1. What fails is a `PageError` that names the call, what it was about, the result and a remedy.
    2. A thread's first call makes the context current in that thread, where it stays.
    """

    def __init__(self, device: int, functions: Any = None) -> None:
        """Retain the primary context, which is the one that torch uses.

        Args:
            device: Its number, as torch counts.
            functions: What has the functions, enums and structs of `cuda.bindings.driver`; None: that module.

        Raises:
            PageError: No `cuda-bindings`, no driver or no such device.
        """
        self.functions = _load() if functions is None else functions
        self.device = device
        self._thread = threading.local()
        self._context: Any = None
        self._bare_call("cuInit", 0)
        self._handle = self._bare_call("cuDeviceGet", device, about=f" of device {device}")
        self._context = self._bare_call("cuDevicePrimaryCtxRetain", self._handle, about=f" of device {device}")

    @property
    def is_retained(self) -> bool:
        """Whether the context is still held."""
        return self._context is not None

    def release(self) -> None:
        """Let go of the context; torch has its own hold on it. Once.

        Raises:
            PageError: The driver refused; the context is still held.
        """
        self._bare_call("cuDevicePrimaryCtxRelease", self._handle, about=f" of device {self.device}")
        self._context = None

    def call(self, name: str, *args: Any, about: str = "") -> Any:
        """Call a function, and return what it gives besides its result; `about` goes into the error.

        Raises:
            PageError: Any result but success.
        """
        if not getattr(self._thread, "has_context", False):
            self._bare_call("cuCtxSetCurrent", self._context, about=f" to that of device {self.device}")
            self._thread.has_context = True
        return self._bare_call(name, *args, about=about)

    def _bare_call(self, name: str, *args: Any, about: str = "") -> Any:
        try:
            code, *values = getattr(self.functions, name)(*args)
        except RuntimeError as e:  # of the bindings: no library, or one too old to have the function
            reason = str(e).rstrip(".")
            raise PageError(f"{name}{about}: {reason}. Install NVIDIA's driver, for CUDA 12 or newer.") from e
        if code != self.functions.CUresult.CUDA_SUCCESS:
            result = getattr(code, "name", str(code))
            raise PageError(f"{name}{about}: {result}. {_REMEDIES.get(result, _OTHER_REMEDY)}")
        return values[0] if values else None


def allocation_properties(functions: Any, device: int) -> Any:
    """Return the CUmemAllocationProp of memory that lies on the device and stays there."""
    properties = functions.CUmemAllocationProp()
    properties.type = functions.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = functions.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    return properties


def access_descriptor(functions: Any, device: int) -> Any:
    """Return the CUmemAccessDesc of reads and writes by the device itself."""
    access = functions.CUmemAccessDesc()
    access.location.type = functions.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device
    access.flags = functions.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _load() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as e:
        raise PageError(f"no CUDA bindings for Python ({e}). Remedy: pip install cuda-bindings") from e
