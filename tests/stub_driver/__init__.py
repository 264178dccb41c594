"""Stub CUDA libraries: a faked H200 that computes nothing, for checks of a CUDA vLLM on a machine without a GPU."""

from __future__ import annotations

from stub_driver.build import StubError as StubError
from stub_driver.build import build as build
from stub_driver.build import environment as environment
