"""Quantized decoder layers: packing, kernels, the variant store, and switching between formats.

Needs torch and nothing else of ours; vLLM's operators are used where another package has loaded them.
"""

# First: in a format, kernels are tried in the order in which they register.
from . import kernels as kernels  # isort: skip
from .checkpoint import Checkpoint, ImportedLayer, tensor_files
from .cuda_float8 import F8A8Cutlass
from .errors import CheckpointError, KernelError, ProfileError, QuantError, StoreError, SwapError
from .float8 import QuantF8
from .halves import HALVES, Half, format_of, half_of, join_format, split_format
from .kernel_base import KernelBase
from .linears import LinearImpl, Native
from .machete import W4A16Machete
from .marlin import W4A16Marlin, W8A16Marlin
from .memory import trim
from .neutral import (
    Quant,
    QuantW4,
    QuantW8,
    choose_group_size,
    dequantize_w4,
    dequantize_w8,
    quantize_w4,
    quantize_w8,
    regroup,
)
from .profile import LayerScales, Profile, Rung, base_fingerprint, read_profile, write_profile
from .registry import CANDIDATES, FORMATS, Kernel, register, unregister
from .selftest import KernelReport, by_preference, check_kernel, choose, probe
from .sensitivity import Change, Move, QuadraticCost, Unit, greedy, layer_importance_order
from .smoothing import Fold, Scale, apply_scales, choose_scale, folds_of
from .store import BASE, StoredLayer, VariantStore
from .store import SCHEMA as STORE_SCHEMA
from .swapper import BIAS, RECIPE_MARK, LayerSwapper, LinearSlot, TensorSlot
from .tensorfile import LayerTensors, digest

__all__ = [
    "apply_scales",
    "BASE",
    "base_fingerprint",
    "BIAS",
    "by_preference",
    "CANDIDATES",
    "Change",
    "check_kernel",
    "Checkpoint",
    "CheckpointError",
    "choose",
    "choose_group_size",
    "choose_scale",
    "dequantize_w4",
    "dequantize_w8",
    "digest",
    "F8A8Cutlass",
    "Fold",
    "folds_of",
    "format_of",
    "FORMATS",
    "greedy",
    "Half",
    "half_of",
    "HALVES",
    "ImportedLayer",
    "join_format",
    "Kernel",
    "KernelBase",
    "KernelError",
    "KernelReport",
    "layer_importance_order",
    "LayerScales",
    "LayerSwapper",
    "LayerTensors",
    "LinearImpl",
    "LinearSlot",
    "Move",
    "Native",
    "probe",
    "Profile",
    "ProfileError",
    "QuadraticCost",
    "QuantError",
    "Quant",
    "QuantF8",
    "quantize_w4",
    "quantize_w8",
    "QuantW4",
    "QuantW8",
    "read_profile",
    "RECIPE_MARK",
    "register",
    "regroup",
    "Rung",
    "Scale",
    "split_format",
    "STORE_SCHEMA",
    "StoredLayer",
    "StoreError",
    "SwapError",
    "tensor_files",
    "TensorSlot",
    "trim",
    "Unit",
    "unregister",
    "VariantStore",
    "write_profile",
    "W4A16Machete",
    "W4A16Marlin",
    "W8A16Marlin",
]
