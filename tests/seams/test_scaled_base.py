"""One rank's slice of a quantized linear: what variants are made from, and who adds the bias."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphserve.integration.worker.base_linear import ScaledBase, applied_bias

WIDTHS = [8, 4, 4]  # rows of q, k and v, whole
INPUTS = 32


def slices(rank: int) -> list[int]:
    """Rows of the fused matrix that belong to `rank` of two."""
    starts = (0, WIDTHS[0], sum(WIDTHS[:2]))
    return [s + rank * w // 2 + i for s, w in zip(starts, WIDTHS, strict=True) for i in range(w // 2)]


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_makes_variants_of_its_own_rows(rank: int, per_row: bool) -> None:
    """Guards: scales of the other rank's rows, or of a neighbouring matrix, in the variants of a slice only."""
    torch.manual_seed(0)
    values = torch.randint(-127, 128, (sum(WIDTHS), INPUTS), dtype=torch.int8)
    of_matrix = torch.tensor([0.5, 2.0, 8.0])
    of_row = of_matrix.repeat_interleave(torch.tensor(WIDTHS))[:, None]
    if per_row:
        of_row = of_row * torch.arange(1, len(values) + 1)[:, None]
    rows = slices(rank)
    base: Any = object.__new__(ScaledBase)
    base._linear = SimpleNamespace(
        weight=torch.nn.Parameter(values[rows], requires_grad=False),
        weight_scale=torch.nn.Parameter(of_row[rows] if per_row else of_matrix, requires_grad=False),
        logical_widths=[width // 2 for width in WIDTHS],
        tp_rank=rank,
    )
    assert torch.equal(base.weight(), (values.float() * of_row)[rows])


@pytest.mark.parametrize(
    ("row_parallel", "rank", "skipped", "added"),
    [(True, 0, False, True), (True, 1, False, False), (False, 1, False, True), (False, 0, True, False)],
)
def test_one_rank_adds_the_bias(row_parallel: bool, rank: int, skipped: bool, added: bool) -> None:
    """Guards: the bias of a row-parallel linear in the sum of all ranks twice, or of a column-parallel one nowhere."""
    bias = torch.ones(4)
    linear: Any = SimpleNamespace(bias=bias, skip_bias_add=skipped, tp_rank=rank)
    if row_parallel:
        linear.input_is_parallel = True
    assert (applied_bias(linear) is bias) == added
