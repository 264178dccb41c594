"""What the weights of a quantized model mean, for those that the machine at hand cannot run too."""

from __future__ import annotations

import pytest
import torch

from morphserve.integration.rank_base import dequantize

WIDTHS = [8, 4, 4]  # q, k and v, fused


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("per_row", [True, False])
def test_scales_find_their_rows(dtype: torch.dtype, per_row: bool) -> None:
    """Guards: the scale of one fused matrix on the rows of another."""
    torch.manual_seed(0)
    values = torch.randint(-16, 17, (sum(WIDTHS), 32)).float()  # float8 has these exactly
    scales = 2.0 ** torch.arange(len(WIDTHS))
    rows = torch.cat([scale.expand(width, 1) for scale, width in zip(scales, WIDTHS, strict=True)])
    if per_row:
        rows = rows * torch.arange(1, len(rows) + 1)[:, None]
    found = dequantize(values.to(dtype), rows if per_row else scales, WIDTHS)
    assert found.dtype == torch.float32
    assert torch.equal(found, values * rows)
