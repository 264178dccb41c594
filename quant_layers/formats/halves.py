"""A decoder layer has two halves, attention and MLP, and each may have a format of its own.

A layer's format is written "w8" where both have it and "w8/base" (attention, then MLP) where they differ.
"""

from __future__ import annotations

from typing import Literal

Half = Literal["attention", "mlp"]
BASE = "base"  # the weights as loaded, for restoring
HALVES: tuple[Half, Half] = ("attention", "mlp")
_SEPARATOR = "/"
# Everything else of a layer stands with the MLP: its linears, and the norms behind the attention.
_ATTENTION = ("self_attn.", "input_layernorm")


def split_format(format: str) -> tuple[str, str]:
    """Return the formats of attention and MLP."""
    attention, _, mlp = format.partition(_SEPARATOR)
    return attention, mlp or attention


def join_format(attention: str, mlp: str) -> str:
    """Join the formats of attention and MLP: the inverse of `split_format`."""
    return attention if attention == mlp else f"{attention}{_SEPARATOR}{mlp}"


def half_of(name: str) -> Half:
    """Return the half that a linear or a norm belongs to, by its name inside the layer."""
    return "attention" if name.startswith(_ATTENTION) else "mlp"
