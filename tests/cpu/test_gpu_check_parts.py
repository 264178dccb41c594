"""The parts of scripts/gpu_check.py in a dry run: what of them needs no device, and criteria that can fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from kv_resize import ArenaBacking, ElasticCache, FakePager, PagePool
from morphserve.residence import GraphBanks
from morphserve.residence.graphs import landing
from morphserve.tools.gpucheck import t3_copy, t4_recycle, t5_kernels, t7_opaque
from morphserve.tools.gpucheck.bench import Bench, run_part
from morphserve.tools.gpucheck.engines import MODELS
from morphserve.tools.gpucheck.frame import Options, judge, run_one
from morphserve.tools.gpucheck.mini_engine import MiniEngine
from morphserve.tools.gpucheck.mini_model import BaseLinear, LayerArena, MiniModel
from morphserve.tools.gpucheck.parts import PARTS
from morphserve.tools.gpucheck.results import Findings
from quant_layers import KernelReport
from quant_layers.formats.float8 import F8ScaledLinear

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
BY_KEY = {part.key: part for part in PARTS}


def dry(key: str) -> Findings:
    return run_part(BY_KEY[key].module, Bench("cpu", True, 300.0))


def missed(findings: Findings) -> list[str]:
    """Required criteria that do not hold."""
    return [verdict.name for verdict in findings.verdicts if verdict.required and not verdict.ok]


def test_a_torch_without_cuda_fails_beside_a_driver_with_a_device() -> None:
    """Guards: nine parts skipped, exit code 0, and a GPU that nobody tried."""
    if torch.cuda.is_available():
        pytest.skip("this torch sees a device")
    findings = run_part(BY_KEY["t1"].module, Bench("cuda", False, 5.0))
    assert judge(findings, 0, 1.0)[0] == "failed" and "torch sees none" in findings.error


@pytest.mark.parametrize("key", [key for key in BY_KEY if key != "t5"])
def test_every_part_runs_dry(key: str) -> None:
    """Guards: a typo that shows when a GPU is lent for ten minutes."""
    findings = dry(key)
    if key == "t7" and not t7_opaque.is_there():
        assert findings.skipped == "morphserve.residence.graphs.weight_linear is not there yet"
        return
    assert judge(findings, 0, 1.0) == ("ok", ""), findings.notes
    assert findings.figures and findings.finished


class SmallBench(Bench):
    """Tiny sizes, and otherwise what a real run does."""

    def pick(self, real: T, dry: T) -> T:
        return dry


@pytest.mark.parametrize("key", ["t1", "t2", "t3", "t4", "t5", "t6"])
def test_what_only_a_real_run_does_raises_nothing(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a typo in a line that a dry run leaves out; a failure where nothing but vLLM's operators is missing."""
    monkeypatch.setattr(t5_kernels, "KERNELS", ("fp8_torch", *t5_kernels.OF_VLLM))
    findings = run_part(BY_KEY[key].module, SmallBench("cpu", False, 1.0))
    assert findings.error == "", findings.notes
    of_memory = {"pages are device memory"}  # there is no device to take it from
    assert set(missed(findings)) <= of_memory and findings.figures
    if key == "t5":
        told = {verdict.name for verdict in findings.verdicts if not verdict.ok and verdict.detail}
        assert told - {"all points measured"} == {f"{name}: runs here" for name in t5_kernels.OF_VLLM}


def test_kernels_run_dry_in_tritons_interpreter() -> None:
    """Guards: as above, for the part whose kernels must be told before they are imported."""
    result = run_one(BY_KEY["t5"], Options("cpu", True), 300.0)
    assert result.status == "ok", result.reason + result.output_tail
    names = {figure.name.split()[0] for figure in result.findings.figures}
    wanted = {"bf16", "fp8_torch", *t5_kernels.OF_VLLM}
    wanted |= {"w4a16_triton"} if importlib.util.find_spec("triton") else set()
    assert wanted <= names and result.findings.environment["torch"] == torch.__version__


def test_the_command_runs_dry_from_end_to_end(tmp_path: Path) -> None:
    """Guards: a script that fails before its first part, or prints something after its document."""
    command = [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--device", "cpu", "--dry-run", "--only", "t4,t8"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    document = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert {key: row["status"] for key, row in document["parts"].items()} == {"t4": "ok", "t8": "ok"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.md"]


def test_t1_notices_pages_that_are_not_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a check of new pages that passes on a weight's bytes."""

    def populate(self: ArenaBacking, ranges: Sequence[tuple[int, int]]) -> None:
        original(self, ranges)
        self.buffer[ranges[-1][1] - 1] = 1

    original = ArenaBacking.populate
    monkeypatch.setattr(ArenaBacking, "populate", populate)
    assert {"new pages are zero", "grown pages are zero"} <= set(missed(dry("t1")))


def test_t1_notices_a_shrink_that_goes_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: reads through a graph that pass whatever is mapped."""

    def release(self: ArenaBacking, ranges: Sequence[tuple[int, int]]) -> None:
        self.buffer.fill_(9)
        original(self, ranges)

    original = ArenaBacking.release
    monkeypatch.setattr(ArenaBacking, "release", release)
    assert "what stays survives a shrink" in missed(dry("t1"))


def test_t1_notices_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: books that are never looked at."""
    monkeypatch.setattr(PagePool, "give", lambda self, pages: self._free.extend(pages[1:]))
    findings = dry("t1")
    assert findings.error or "every page is back in the pool" in missed(findings)


def test_t2_notices_a_mover_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an error in the other thread that nobody hears of."""
    monkeypatch.setattr(FakePager, "unmap", lambda self, address: (_ for _ in ()).throw(RuntimeError("refused")))
    found = missed(dry("t2"))
    assert "pages of 4096 B: no call failed" in found and "pages of 4096 B: they did move" in found


def test_t3_notices_a_copy_that_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: gigabytes a second of something else."""
    original = t3_copy.Copier.feed

    def feed(self: t3_copy.Copier) -> None:
        original(self)
        self.target[0] = 255 - self.source[0]

    monkeypatch.setattr(t3_copy.Copier, "feed", feed)
    assert missed(dry("t3")) == ["what was copied arrived"]


@pytest.mark.parametrize("where", ["layer", "kv"])
def test_t4_notices_a_single_byte(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: comparisons that compare nothing."""
    calls = iter(range(1000))
    bring, unmap = t4_recycle._World._bring, ElasticCache.unmap

    def wrong_layer(self: t4_recycle._World, layer: int) -> None:
        bring(self, layer)
        if next(calls) == 5:
            self._arenas[layer].buffer[17] += 1

    def wrong_block(self: ElasticCache, num_blocks: int) -> None:
        unmap(self, num_blocks)
        self.buffer[3] += 1

    if where == "layer":
        monkeypatch.setattr(t4_recycle._World, "_bring", wrong_layer)
    else:
        monkeypatch.setattr(ElasticCache, "unmap", wrong_block)
    assert missed(dry("t4")) == ["every byte of layers and KV was right"]


def test_t5_notices_a_kernel_that_is_ten_percent_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: times of kernels that compute something else."""
    monkeypatch.setattr(t5_kernels, "KERNELS", ("fp8_torch",))
    original = F8ScaledLinear.__call__
    monkeypatch.setattr(F8ScaledLinear, "__call__", lambda self, x: original(self, x) * 1.1)
    assert missed(dry("t5")) == ["fp8_torch: passes its self-test"]
    passes = KernelReport("fp8_torch", "fp8", True, "", 0.5)
    monkeypatch.setattr(t5_kernels, "check_kernel", lambda kernel, device: passes)
    assert missed(dry("t5")) == ["fp8_torch small: error below 0.05"]


def test_t6_notices_weights_that_came_back_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: "bit by bit" of a run that was never compared."""

    def stage(self: MiniEngine, target: int) -> None:
        original(self, target)
        if target == 0:
            self._base[0].bytes[5] += 1

    original = MiniEngine.stage
    monkeypatch.setattr(MiniEngine, "stage", stage)
    found = missed(dry("t6"))
    assert "level 0 after a climb, bit by bit" in found and "weights of level 0 are back, byte by byte" in found


def test_t6_notices_kv_that_lies_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a block table that is not read, so that grown blocks are never tried."""
    original = MiniModel.reset

    def reset(self: MiniModel, first_block: int = 0) -> None:
        original(self, first_block)
        if first_block:
            self.tokens.add_(1).remainder_(self.shape.vocab)

    monkeypatch.setattr(MiniModel, "reset", reset)
    assert "level 1: KV in grown blocks gives the same tokens" in missed(dry("t6"))


def test_t6_notices_a_switch_that_switches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: levels that all run level 0, and so are equal bit by bit."""
    original = MiniEngine._load

    def load(self: MiniEngine, layer: int, arena: LayerArena) -> None:
        original(self, layer, arena)
        for name, (base, _) in self._impls.get(layer, {}).items():
            self._impls[layer][name] = base, BaseLinear(arena.tensors[name]["weight"].clone())

    monkeypatch.setattr(MiniEngine, "_load", load)
    assert "banks differ" in missed(dry("t6"))


def test_t6_fails_when_the_thread_beside_decode_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a move that died in its thread and counts as hidden behind decode."""
    original = MiniEngine.stage
    calls = iter(range(100))

    def stage(self: MiniEngine, target: int) -> None:
        if next(calls) >= 4:  # the climb and its way back have passed
            raise RuntimeError("no memory mapped")
        original(self, target)

    monkeypatch.setattr(MiniEngine, "stage", stage)
    assert "beside decode failed: no memory mapped" in dry("t6").error


def test_t7_notices_a_switch_that_switches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an artefact that has the weights of one level in it."""
    if not t7_opaque.is_there():
        pytest.skip("this tree has no operator to switch")
    monkeypatch.setattr(t7_opaque._Model, "switch", lambda self, num_layers: None)
    assert "2 layers quantized show" in missed(dry("t7"))


@pytest.mark.parametrize("broken", ["switch", "land"])
def test_t7_notices_pieces_of_another_level(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: graphs of other formats, or graphs that leave their results where no other looks for them."""
    if broken == "switch":
        monkeypatch.setattr(GraphBanks, "switch", lambda self, formats: True)
    else:
        monkeypatch.setattr(landing, "land", lambda output, home: output)
    found = missed(dry("t7"))
    assert {"switch": "pieces of several levels in one step give what the layers give",
            "land": "every piece has a graph at every level"}[broken] in found  # fmt: skip


def test_the_8b_shape_is_the_one_the_kernels_are_measured_on() -> None:
    """Guards: figures of kernels and of engines that speak of different models."""
    from morphserve.tools.gpucheck.mini_model import Shape
    from morphserve.tools.gpucheck.t5_kernels import SHAPES

    config = MODELS["8B shape"]
    shape = Shape()
    assert {name: shape.linear(name) for name in SHAPES} == dict(SHAPES)
    assert (config["hidden_size"], config["intermediate_size"]) == (shape.hidden, shape.inner)
    assert sum(n * k * 2 for n, k in SHAPES.values()) == 436_207_616
