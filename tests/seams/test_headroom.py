"""What a rank says around the worst-case forward passes that it measures memory with."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from seams.logged import records_of

from morphserve.integration.worker import headroom

pytestmark = pytest.mark.seams


class Layers:
    """Four layers, of which some are in other formats for a pass."""

    linears = range(4)
    kernels = {"w8": SimpleNamespace(name="w8_int16")}

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def switch(self, mixed: dict[int, str]) -> None:
        """Take any format."""


def test_minutes_of_passes_are_said_before_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: a first start of a large model that says nothing for four minutes, and is killed for hung."""
    said_before: list[int] = []
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=16),
        compilation_config=SimpleNamespace(mode=0),
        parallel_config=SimpleNamespace(world_size=1),
    )
    runner = SimpleNamespace(profile_run=lambda: said_before.append(len(records_of(caplog))))
    worker: Any = SimpleNamespace(vllm_config=config, model_runner=runner, rank=0)
    monkeypatch.setattr(headroom, "_set_global_compilation_settings", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(headroom, "peak_beyond_now", lambda forward: (forward(), 100)[1])
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.morphserve")
    layers: Any = Layers(tmp_path)
    assert headroom.measure(worker, layers) == 200
    assert "3 passes of 2048 tokens" in caplog.messages[0]
    assert said_before == [1, 1, 1], "said as often as it runs, before the first"
    assert list(json.loads((tmp_path / "worst_forward.json").read_text()).values()) == [200]
    assert headroom.known(worker, layers) == 200
