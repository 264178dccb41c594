"""Quantized decoder layers: packing, kernels, the variant store, and switching between formats.

Needs torch and nothing else of ours; vLLM's operators are used where another package has loaded them.
"""

from .errors import KernelError, QuantError, StoreError, SwapError
from .kernels import CANDIDATES, FORMATS, Kernel, LinearImpl, Native
from .memory import trim
from .packing import (
    QuantW4,
    QuantW8,
    choose_group_size,
    dequantize_w4,
    dequantize_w8,
    quantize_w4,
    quantize_w8,
)
from .selftest import KernelReport, check_kernel, choose, probe
from .store import BASE, StoredLayer, VariantStore
from .swapper import LayerSwapper, LinearSlot
from .tensorfile import LayerTensors, digest

__all__ = [
    "BASE",
    "CANDIDATES",
    "FORMATS",
    "Kernel",
    "KernelError",
    "KernelReport",
    "LayerSwapper",
    "LayerTensors",
    "LinearImpl",
    "LinearSlot",
    "Native",
    "QuantError",
    "QuantW4",
    "QuantW8",
    "StoreError",
    "StoredLayer",
    "SwapError",
    "VariantStore",
    "check_kernel",
    "choose",
    "choose_group_size",
    "dequantize_w4",
    "dequantize_w8",
    "digest",
    "probe",
    "quantize_w4",
    "quantize_w8",
    "trim",
]
