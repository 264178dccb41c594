"""What a rank tells the engine once its weights are loaded. Plain values: they cross processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankDescription:
    """One rank's morphable layers.

    Attributes:
        rank: global rank.
        layer_bytes: format -> bytes of each decoder layer of the MODEL on this rank, 0 for the layers of
            other pipeline stages. Morphable linears only: norms and embeddings never change.
        largest_linear_bytes: of one linear at full precision.
        kernels: format -> name of the kernel that serves it here.
        page_bytes: of device memory that layers and KV exchange; None where both are host memory.
        staging_bytes: reserved for the layers of one chunk, where the settings leave open how many; else None.
    """

    rank: int
    layer_bytes: dict[str, tuple[int, ...]]
    largest_linear_bytes: int
    kernels: dict[str, str]
    page_bytes: int | None = None
    staging_bytes: int | None = None
