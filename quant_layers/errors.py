"""Errors of this package. Each message says the value, the limit and the remedy."""

from __future__ import annotations


class QuantError(Exception):
    """Base of every error that quant_layers raises on purpose."""


class KernelError(QuantError, RuntimeError):
    """No kernel on this machine can run a format, or a weight does not fit a kernel."""


class StoreError(QuantError, RuntimeError):
    """A variant file is missing, damaged, cannot be written, or belongs to other weights."""


class SwapError(QuantError, RuntimeError):
    """A layer swap was asked for that the swapper's present state does not allow."""


class ProfileError(QuantError, RuntimeError):
    """A profile is missing, damaged, cannot be written, or was made for another model."""


class CheckpointError(QuantError, RuntimeError):
    """A quantized checkpoint is damaged, in a form that is not supported, or of another model."""
