"""T5 of the GPU check where there is no GPU: vLLM's kernels run on stand-ins for its operators."""

from __future__ import annotations

from unittest.mock import patch

from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.parts import kernels
from tests.stand_in_ops import on_any_device, stand_in_operators


def run(bench: Bench) -> None:
    """As the part's own."""
    anywhere = [on_any_device(make) if make.name in kernels.OF_VLLM else make for make in kernels.CANDIDATES]
    with stand_in_operators(), patch.object(kernels, "CANDIDATES", anywhere):
        kernels.run(bench)
