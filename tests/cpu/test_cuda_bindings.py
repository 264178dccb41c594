"""The stub driver against NVIDIA's `cuda-bindings`, which imports without a device."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from typing import Any

import pytest
import torch
from cpu import cuda_stub_types
from cpu.cuda_stub import StubDriver

from kv_resize import CudaPageAllocator, PageError
from kv_resize.cuda_driver import access_descriptor, allocation_properties


@pytest.fixture(scope="module")
def bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as e:
        pytest.skip(f"cuda-bindings is not installed: {e}")


def num_parameters(function: Any) -> int:
    return len(inspect.signature(function).parameters)


FUNCTIONS = sorted(name for name in vars(StubDriver) if re.match("cu[A-Z]", name))
ENUMS = [
    kind for kind in vars(cuda_stub_types).values() if isinstance(kind, type) and issubclass(kind, enum.Enum)
    and kind.__module__ == cuda_stub_types.__name__
]
STRUCTS = [cuda_stub_types.CUmemAllocationProp, cuda_stub_types.CUmemAccessDesc, cuda_stub_types.CUmemLocation]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_the_stub_takes(bindings: Any, name: str) -> None:
    """Guards: a page allocator that runs on the stub only. It can call nothing that the stub has not."""
    assert num_parameters(getattr(bindings, name)) == num_parameters(getattr(StubDriver, name)) - 1  # without self


@pytest.mark.parametrize("kind", ENUMS)
def test_enums_have_the_stubs_members(bindings: Any, kind: type[enum.IntEnum]) -> None:
    """Guards: names or values of a stub that no driver has."""
    theirs = getattr(bindings, kind.__name__)
    for member in kind:
        their = getattr(theirs, member.name)
        assert (int(their), their.name) == (member.value, member.name)


@pytest.mark.parametrize("struct", STRUCTS)
def test_structs_have_the_stubs_fields(bindings: Any, struct: type[Any]) -> None:
    """Guards: a field that is set on the stub only."""
    for field in struct.__slots__:
        assert hasattr(getattr(bindings, struct.__name__), field)


def test_structs_hold_what_the_allocator_sets(bindings: Any) -> None:
    """Guards: a nested struct that is a copy, so that memory is asked for on no device in particular."""
    properties, access = allocation_properties(bindings, 3), access_descriptor(bindings, 3)
    device = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    assert properties.type == bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    assert (properties.location.type, properties.location.id) == (device, 3)
    assert (access.location.type, access.location.id) == (device, 3)
    assert access.flags == bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE


def test_a_machine_without_a_driver_is_told_what_to_do(bindings: Any) -> None:
    """Guards: an error of the bindings' own, from the depth of a worker, where no driver or device is."""
    if torch.cuda.is_available():
        pytest.skip("a device is here")
    with pytest.raises(PageError, match="cuInit.*(Install|Check)"):
        CudaPageAllocator(0)
