"""How far weights are from the grid of Q4_1, and how far they have moved."""

from __future__ import annotations

import math

import pytest
import torch
from off_grid import moved, off_grid


def test_weights_on_the_grid_are_on_it() -> None:
    """Guards: a distance that says little of a grid, because ends or steps of groups are taken for others'."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 16, (64, 3, 32), generator=generator).float()
    places[..., 0], places[..., 1] = 0, 15
    low, step = torch.randn(64, 3, 1, generator=generator), torch.rand(64, 3, 1, generator=generator) + 0.1
    born = (low + step * places).reshape(64, 96)
    assert off_grid([born]) < 1e-4
    shifted = (low + step * (places + torch.where((places > 0) & (places < 15), 0.25, 0.0))).reshape(64, 96)
    inside = ((places > 0) & (places < 15)).float().mean().item()
    assert off_grid([shifted]) == pytest.approx(0.25 * math.sqrt(inside), rel=1e-3)
    assert moved([born], [1.02 * born]) == pytest.approx(0.02, rel=1e-3)


def test_any_weights_are_nowhere_near() -> None:
    """Guards: the figure that tells weights which have left the grid."""
    anywhere = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))
    assert 0.26 < off_grid([anywhere]) < 1 / math.sqrt(12)  # two of 32 are the ends themselves
