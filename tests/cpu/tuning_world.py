"""A study small enough for tests: two short bursts on the simulated machine of sim_world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from cpu import sim_world

from morphserve.tools.tune.evaluate import World, load_windows
from morphserve.tools.tune.space import Space, load_space
from morphserve.tools.workload import Slo, save_workload

SLO = Slo(ttft_s=0.5, tpot_s=0.06)
SPACE: dict[str, Any] = {
    "policy.degrade_above": {"low": 0.5, "high": 1.0, "step": 0.05},
    "policy.target_usage": {"low": 0.3, "high": 0.9},
    "policy.restore_after_s": {"low": 0.1, "high": 3.0, "log": True},
    "policy.max_level": {"choices": ["w8", "deepest"]},
}


def burst(path: Path, num_requests: int = 24, every_s: float = 0.08, output_tokens: int = 60) -> Path:
    """A trace file whose requests come faster than they are served."""
    rows = [(0.2 + every_s * i, 30 + 7 * (i % 5), output_tokens + 11 * (i % 4)) for i in range(num_requests)]
    save_workload(sim_world.workload(rows), path)
    return path


def write_inputs(directory: Path, space: dict[str, Any] | None = None, **policy: Any) -> dict[str, Path]:
    """Config, space, step times and two windows as files."""
    config = sim_world.config(**policy).model_dump(mode="json", exclude_none=True)
    files = {name: directory / name for name in ("config.yaml", "space.yaml", "step_times.json")}
    files["config.yaml"].write_text(yaml.safe_dump(config))
    kind = policy.get("kind", "threshold")
    files["space.yaml"].write_text(yaml.safe_dump({"version": 1, kind: SPACE if space is None else space}))
    sim_world.CALIBRATION.save(files["step_times.json"])
    return files | {
        "dev": burst(directory / "dev.jsonl"),
        "held_out": burst(directory / "held_out.jsonl", num_requests=16, every_s=0.1, output_tokens=80),
    }


def make_space(directory: Path, keys: dict[str, Any] | None = None, **policy: Any) -> Space:
    """The space of such files."""
    files = write_inputs(directory, keys, **policy)
    return load_space(files["space.yaml"], sim_world.config(**policy))


def make_world(directory: Path) -> World:
    """The windows of such files on the simulated machine."""
    files = write_inputs(directory)
    dev, held_out = load_windows([str(files["dev"])], [str(files["held_out"])])
    return World((*dev, *held_out), 1, sim_world.SERVER, sim_world.CALIBRATION, SLO)
