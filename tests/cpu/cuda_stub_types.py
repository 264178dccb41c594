"""Enums, structs and handles of `cuda.bindings.driver`, as far as `CudaPageAllocator` uses them; for cuda_stub.py."""

from __future__ import annotations

import enum


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_PERMITTED = 800
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_UNKNOWN = 999


class CUmemAllocationType(enum.IntEnum):
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class CUmemLocationType(enum.IntEnum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class CUmemAccess_flags(enum.IntEnum):
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3


class CUmemAllocationGranularity_flags(enum.IntEnum):
    CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0


class CUmemLocation:
    __slots__ = ("id", "type")
    type: int
    id: int


class CUmemAllocationProp:
    __slots__ = ("location", "type")
    type: int

    def __init__(self) -> None:
        self.location = CUmemLocation()


class CUmemAccessDesc:
    __slots__ = ("flags", "location")
    flags: int

    def __init__(self) -> None:
        self.location = CUmemLocation()


class Opaque:
    """A handle or an address: `int()` tells its value, and nothing can be reckoned with it, as in the bindings."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value
