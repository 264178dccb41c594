"""Quantized decoder layers: packing, kernels, the variant store, and switching between formats.

Needs torch and nothing else of ours; vLLM's operators are used where another package has loaded them.
"""

from .checkpoint import Checkpoint, ImportedLayer
from .errors import CheckpointError, KernelError, ProfileError, QuantError, StoreError, SwapError
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
    regroup,
)
from .profile import LayerScales, Profile, base_fingerprint, read_profile, write_profile
from .selftest import KernelReport, check_kernel, choose, probe
from .smoothing import Fold, Scale, apply_scales, choose_scale, folds_of
from .store import BASE, StoredLayer, VariantStore
from .swapper import BIAS, RECIPE_MARK, LayerSwapper, LinearSlot, TensorSlot
from .tensorfile import LayerTensors, digest

__all__ = [
    "BASE",
    "BIAS",
    "CANDIDATES",
    "Checkpoint",
    "CheckpointError",
    "FORMATS",
    "Fold",
    "ImportedLayer",
    "Kernel",
    "KernelError",
    "KernelReport",
    "LayerScales",
    "LayerSwapper",
    "LayerTensors",
    "LinearImpl",
    "LinearSlot",
    "Native",
    "Profile",
    "ProfileError",
    "QuantError",
    "QuantW4",
    "QuantW8",
    "RECIPE_MARK",
    "Scale",
    "StoreError",
    "StoredLayer",
    "SwapError",
    "TensorSlot",
    "VariantStore",
    "apply_scales",
    "base_fingerprint",
    "check_kernel",
    "choose",
    "choose_group_size",
    "choose_scale",
    "dequantize_w4",
    "dequantize_w8",
    "digest",
    "folds_of",
    "probe",
    "quantize_w4",
    "quantize_w8",
    "read_profile",
    "regroup",
    "trim",
    "write_profile",
]
