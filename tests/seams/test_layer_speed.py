"""Times of a layer's linears: what they are of, and when they are taken again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from morphserve import cpu_tier
from morphserve.control.ladder import TIMED_BATCHES
from morphserve.integration.worker import layer_speed
from morphserve.integration.worker.layer_speed import TimedLayer, factors, known_or_measured, time_layer

pytestmark = pytest.mark.cpu_tier

KERNELS = {"w8": "some_w8"}


class Clock:
    """Stands still but for the linears, which say what they take."""

    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def linear(self, per_row_s: float, num_inputs: int, fixed_s: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
        """Every third call takes ten times as long: something else has the core."""
        calls = 0

        def run(x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            assert x.shape[1] == num_inputs and x.dtype == torch.float16 and torch.is_inference_mode_enabled()
            assert torch.get_num_threads() == 1
            self.now_s += (fixed_s + per_row_s * x.shape[0]) * (10 if calls % 3 == 2 else 1)
            return x

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(layer_speed, "time", found)
    return found


def layer(clock: Clock, w8_s: float = 1.0) -> TimedLayer:
    base = {"self_attn.o_proj": clock.linear(1.0, 8), "mlp.up": clock.linear(2.0, 8), "mlp.down": clock.linear(2.0, 16)}
    w8 = {
        "self_attn.o_proj": clock.linear(w8_s / 2, 8), "mlp.up": clock.linear(w8_s, 8, 8.0),
        "mlp.down": clock.linear(w8_s, 16),
    }  # fmt: skip
    num_inputs = {"self_attn.o_proj": 8, "mlp.up": 8, "mlp.down": 16}
    return TimedLayer({"base": base, "w8": w8}, num_inputs, torch.float16)  # type: ignore[dict-item]


def test_each_half_takes_its_least_time(clock: Clock) -> None:
    """Guards: a mean that holds what else ran meanwhile; one batch's figure for another; a linear in the wrong half; a
    server that goes on with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = time_layer(layer(clock))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for i, n in enumerate(TIMED_BATCHES):
        assert found["base"][i] == pytest.approx((n * 1.0, n * 4.0))
        assert found["w8"][i] == pytest.approx((n * 0.5, n * 2.0 + 8.0))
    assert factors(found) == {"w8": (2.1, 0.7, 0.55)}
    assert layer_speed.describe(found) == "w8 2.10, 0.70, 0.55 (batches of 1, 8, 32)"


def test_one_thread_where_vllm_forbids_to_ask_for_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: in a CPU worker, whose torch.set_num_threads only warns, layers are timed on all of its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "set_num_threads", lambda number: pytest.fail("vLLM warns"))
            time_layer(layer(clock))
            with pytest.raises(KeyError):
                time_layer(TimedLayer({"base": {"mlp.up": lambda x: {}["x"]}}, {"mlp.up": 8}, torch.float16))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_figures_are_taken_once_for_their_conditions(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: measuring at every start; figures of another kernel, dtype or tier."""
    built = 0

    def build() -> TimedLayer:
        nonlocal built
        built += 1
        return layer(clock, w8_s=float(built))

    def ask(dtype: torch.dtype = torch.float16, kernels: dict[str, str] = KERNELS) -> Any:
        return known_or_measured(tmp_path, dtype, kernels, build)

    first = ask()
    assert ask() == first and built == 1
    assert ask(torch.bfloat16) != first and ask(kernels={"w8": "another"}) != first and built == 3
    with monkeypatch.context() as patch:
        patch.setattr(cpu_tier, "tier", lambda: "none of these")
        ask()
    assert built == 4 and ask() == first, "what was measured before is kept"


@pytest.mark.parametrize("damage", ["", "[]", '{"a": 1}', "cut", "zeros"])
def test_a_damaged_file_is_measured_again(clock: Clock, tmp_path: Path, damage: str) -> None:
    """Guards: a start that fails on half a file, or serves by factors that are no numbers."""
    first = known_or_measured(tmp_path, torch.float16, KERNELS, lambda: layer(clock))
    file = tmp_path / "layer_times.json"
    whole = file.read_text()
    zeros = json.dumps({key: {fmt: [[0.0, 0.0]] * 3 for fmt in times} for key, times in json.loads(whole).items()})
    file.write_text({"cut": whole[:60], "zeros": zeros}.get(damage, damage))
    again = known_or_measured(tmp_path, torch.float16, KERNELS, lambda: layer(clock, w8_s=3.0))
    assert again["base"] == first["base"] and again["w8"] != first["w8"], "not what the file said"
    assert known_or_measured(tmp_path, torch.float16, KERNELS, lambda: pytest.fail("was written")) == again
