"""What a rank tells the engine once its weights are loaded. Plain values: they cross processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from morphserve.control import LayerTimes


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
        left_out: optional format |-> why no kernel runs it here.
        layer_times: how long a layer's linears take, by format; empty where that was not measured.
        staging_bytes: reserved for the layers of one swap batch, where the settings leave open how many; else None.
    """

    rank: int
    layer_bytes: dict[str, tuple[int, ...]]
    largest_linear_bytes: int
    kernels: dict[str, str]
    page_bytes: int | None = None
    staging_bytes: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    layer_times: LayerTimes = field(default_factory=dict)
