"""Quantized decoder layers: packing, kernels, the variant store, and switching between formats.

Needs torch and nothing else of ours; vLLM's operators are used where another package has loaded them.
"""

# First: in a format, kernels are tried in the order in which they register.
from quant_layers.kernels import cpu as cpu  # isort: skip
from quant_layers.formats.canonical import Quant, QuantW4, QuantW8, choose_group_size, quantize_w4, quantize_w8, regroup
from quant_layers.formats.float8 import QuantF8
from quant_layers.formats.halves import BASE, HALVES, Half, half_of, join_format, split_format
from quant_layers.kernels.base import KernelBase
from quant_layers.kernels.cpu_linears import LinearImpl, Native
from quant_layers.kernels.float8 import F8A8Cutlass
from quant_layers.kernels.machete import W4A16Machete
from quant_layers.kernels.marlin import W4A16Marlin, W8A16Marlin
from quant_layers.kernels.registry import CANDIDATES, FORMATS, Kernel, register
from quant_layers.kernels.selftest import KernelReport, by_preference, check_kernel, choose, probe
from quant_layers.likeness import FirstLook, HalfLayer
from quant_layers.private import only_ours, private_directory
from quant_layers.sources.checkpoint import Checkpoint, ImportedLayer, tensor_files
from quant_layers.sources.profile import Profile, ProfileLevel, base_fingerprint, read_profile, write_profile
from quant_layers.sources.sensitivity import Change, Move, QuadraticCost, Unit, greedy, layer_importance_order
from quant_layers.sources.smoothing import Fold, Scale, apply_scales, choose_scale, folds_of
from quant_layers.store.layer_store import SCHEMA as STORE_SCHEMA
from quant_layers.store.layer_store import VariantStore
from quant_layers.store.tensorfile import LayerTensors, digest
from quant_layers.swap import (
    BIAS,
    SOURCE_MARK,
    Build,
    LayerSwapper,
    LinearSlot,
    LoadedPart,
    Part,
    PartSource,
    TensorSlot,
)

from .errors import CheckpointError, KernelError, ProfileError, QuantError, StoreError, SwapError
from .memory import trim

__all__ = [
    "apply_scales",
    "BASE",
    "base_fingerprint",
    "BIAS",
    "Build",
    "by_preference",
    "CANDIDATES",
    "Change",
    "check_kernel",
    "Checkpoint",
    "CheckpointError",
    "choose",
    "choose_group_size",
    "choose_scale",
    "digest",
    "F8A8Cutlass",
    "FirstLook",
    "Fold",
    "folds_of",
    "FORMATS",
    "greedy",
    "Half",
    "half_of",
    "HalfLayer",
    "HALVES",
    "ImportedLayer",
    "join_format",
    "Kernel",
    "KernelBase",
    "KernelError",
    "KernelReport",
    "layer_importance_order",
    "LayerSwapper",
    "LayerTensors",
    "LinearImpl",
    "LinearSlot",
    "LoadedPart",
    "Move",
    "Native",
    "only_ours",
    "Part",
    "PartSource",
    "private_directory",
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
    "SOURCE_MARK",
    "register",
    "regroup",
    "ProfileLevel",
    "Scale",
    "split_format",
    "STORE_SCHEMA",
    "StoreError",
    "SwapError",
    "tensor_files",
    "TensorSlot",
    "trim",
    "Unit",
    "VariantStore",
    "write_profile",
    "W4A16Machete",
    "W4A16Marlin",
    "W8A16Marlin",
]
