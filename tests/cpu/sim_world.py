"""A machine and a model for simulations: plausible figures of SmolLM2-135M on one CPU core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from morphserve.config import MorphServeConfig, parse_config
from morphserve.control.budget import RankBytes
from morphserve.tools.sim import Calibration, SimServer
from morphserve.tools.workload.formats import TraceRequest
from morphserve.tools.workload.workload import Workload
from policies import LayerMove, StepTime, StepTimes

NUM_LAYERS = 30
LAYER_BYTES = 7_077_888
TIMES = StepTimes(
    formats={
        "base": StepTime(0.012, 0.0004, 0.00025, 1.2e-6),
        "w8": StepTime(0.007, 0.0003, 0.00015, 1.2e-6),
        "w4": StepTime(0.008, 0.0006, 0.00030, 1.2e-6),
    },
    move=LayerMove(0.0015, 0.0018),
    offset_s=0.004,
)
CALIBRATION = Calibration(
    TIMES,
    RankBytes(
        {
            "base": [LAYER_BYTES] * NUM_LAYERS,
            "w8": [LAYER_BYTES // 2 + 20_000] * NUM_LAYERS,
            "w4": [LAYER_BYTES * 29 // 100] * NUM_LAYERS,
        },
        737_280,
    ),
    NUM_LAYERS,
    32,
)
SERVER = SimServer(num_blocks=49, block_size=32, max_model_len=512)


def workload(requests: Sequence[tuple[float, int, int]], name: str = "made") -> Workload:
    """Requests as (arrival, prompt tokens, output tokens)."""
    return Workload(name, tuple(TraceRequest(*request) for request in requests), 512)


def config(**policy: Any) -> MorphServeConfig:
    """The demo's ladder under some policy; without arguments its threshold policy."""
    steps = [{"format": "w8", "layers_per_level": 30}, {"format": "w4", "layers_per_level": 10}]
    return parse_config(
        {
            "ladder": {"steps": steps, "expected_kl": {"w8": 0.0289, "w4": 0.3061}},
            "policy": policy
            or {"kind": "threshold", "degrade_above": 0.8, "target_usage": 0.45, "restore_below": 0.6},
        }
    )
