"""The parts of scripts/gpu_check.py in a dry run: what of them needs no device, and criteria that can fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from kv_resize import ArenaBacking, ElasticCache, FakePageAllocator, PagePool
from morphserve.residence import GraphSets, HostCopier, WeightArena
from morphserve.residence.graphs import output_alias
from morphserve.tools.gpucheck.bench import Bench, run_part
from morphserve.tools.gpucheck.engines import MODELS
from morphserve.tools.gpucheck.frame import Options, judge, run_one
from morphserve.tools.gpucheck.mini.model import BaseLinear, MiniModel, Shape
from morphserve.tools.gpucheck.mini.rank import MiniRank
from morphserve.tools.gpucheck.parts import PARTS, copy, kernels, opaque, recycle
from morphserve.tools.gpucheck.results import Findings
from quant_layers import BASE, KernelReport
from quant_layers.formats.float8 import F8ScaledLinear

T = TypeVar("T")
Parts = list[Any]  # of layers: what is mapped and unmapped as one
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
    assert judge(findings, 0, 1.0) == ("ok", ""), findings.notes
    assert findings.figures and findings.finished


class SmallBench(Bench):
    """Tiny sizes, and otherwise what a real run does."""

    def pick(self, real: T, dry: T) -> T:
        return dry


@pytest.mark.parametrize("key", ["t1", "t2", "t3", "t4", "t5", "t6"])
def test_what_only_a_real_run_does_raises_nothing(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a typo in a line that a dry run leaves out; a failure where nothing but vLLM's operators is missing."""
    monkeypatch.setattr(kernels, "KERNELS", ("fp8_torch", *kernels.OF_VLLM))
    findings = run_part(BY_KEY[key].module, SmallBench("cpu", False, 1.0))
    assert findings.error == "", findings.notes
    of_memory = {"pages are device memory", "close gives the memory back"}  # there is no device to take it from
    assert set(missed(findings)) <= of_memory and findings.figures
    if key == "t5":
        told = {verdict.name for verdict in findings.verdicts if not verdict.ok and verdict.detail}
        assert told - {"all points measured"} == {f"{name}: runs here" for name in kernels.OF_VLLM}


def test_kernels_run_dry_in_tritons_interpreter() -> None:
    """Guards: as above, for the part whose kernels must be told before they are imported."""
    part = replace(BY_KEY["t5"], module="tests.rehearsed_kernels")
    result = run_one(part, Options("cpu", True), 300.0)
    assert result.status == "ok", result.reason + result.output_tail
    names = {figure.name.split()[0] for figure in result.findings.figures}
    wanted = {"bf16", "fp8_torch", *kernels.OF_VLLM}
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
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.log", "gpu_check.md"]


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

    def refuse(self: Any, address: int) -> None:
        raise RuntimeError("refused")

    monkeypatch.setattr(FakePageAllocator, "unmap", refuse)
    found = missed(dry("t2"))
    assert "pages of 4096 B: no call failed" in found and "pages of 4096 B: they did move" in found


def test_t3_notices_a_copy_that_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: gigabytes a second of something else."""
    original = copy.Copier.feed

    def feed(self: copy.Copier) -> None:
        original(self)
        self.target[0] = 255 - self.source[0]

    monkeypatch.setattr(copy.Copier, "feed", feed)
    assert missed(dry("t3")) == ["what was copied arrived"]


@pytest.mark.parametrize(("readings", "rounds"), [(0, 0), (2, 1)])
def test_t4_says_how_far_it_came(readings: int, rounds: int) -> None:
    """Guards: a part that is killed on a full host with all that it has found."""
    clock = iter([0.0, *[0.0] * readings])
    bench = Bench("cpu", True, 10.0, clock=lambda: next(clock, 11.0))
    found = run_part("morphserve.tools.gpucheck.parts.recycle:run", bench)
    assert found.error == f"{rounds} rounds of 3 are done."
    assert [figure.repeats for figure in found.figures if "round" in figure.name] == [rounds] * bool(rounds)


@pytest.mark.parametrize("where", ["layer", "kv"])
def test_t4_notices_a_single_byte(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: comparisons that compare nothing."""
    calls = iter(range(1000))
    bring, unmap = recycle._World._bring, ElasticCache.unmap

    def wrong_layer(self: recycle._World, layer: int) -> None:
        bring(self, layer)
        if next(calls) == 5:
            self._bytes_of(layer)[17] += 1

    def wrong_block(self: ElasticCache, num_blocks: int) -> None:
        unmap(self, num_blocks)
        self.buffer[3] += 1

    if where == "layer":
        monkeypatch.setattr(recycle._World, "_bring", wrong_layer)
    else:
        monkeypatch.setattr(ElasticCache, "unmap", wrong_block)
    assert missed(dry("t4")) == ["every byte of layers and KV was right"]


def test_t5_notices_a_kernel_that_is_ten_percent_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: times of kernels that compute something else."""
    monkeypatch.setattr(kernels, "KERNELS", ("fp8_torch",))
    original = F8ScaledLinear.__call__
    monkeypatch.setattr(F8ScaledLinear, "__call__", lambda self, x: original(self, x) * 1.1)
    assert missed(dry("t5")) == ["fp8_torch: passes its self-test"]
    passes = KernelReport("fp8_torch", "fp8", True, "", 0.5)
    monkeypatch.setattr(kernels, "check_kernel", lambda kernel, device: passes)
    assert missed(dry("t5")) == ["fp8_torch small: error below 0.05"]


def load_with(fault: Callable[[WeightArena, Parts], None]) -> Callable[[WeightArena, Parts], None]:
    """`WeightArena.load`, and a fault in whatever a transition brings in."""
    original = WeightArena.load

    def load(self: WeightArena, parts: Parts) -> None:
        original(self, parts)
        if threading.current_thread() is not threading.main_thread():
            fault(self, parts)

    return load


def test_t6_notices_weights_that_came_back_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: "bit by bit" of a run that was never compared."""

    def one_byte(arena: WeightArena, parts: Parts) -> None:
        if parts[0].format == BASE:
            tensors = next(iter(arena.tensors(parts[0]).values()))
            tensors["weight"].view(torch.uint8).flatten()[5] += 1

    monkeypatch.setattr(WeightArena, "load", load_with(one_byte))
    found = missed(dry("t6"))
    assert "level 0 after a climb, bit by bit" in found and "weights of level 0 are back, byte by byte" in found


def test_t6_notices_a_copy_to_a_wrong_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: packed weights that are wrong in the same way every time, and so repeat themselves."""

    def copy(self: HostCopier, destination: torch.Tensor, source: torch.Tensor) -> None:
        moved = threading.current_thread() is not threading.main_thread()
        destination.copy_(source.roll(256) if moved else source)

    monkeypatch.setattr(HostCopier, "copy", copy)
    found = missed(dry("t6"))
    assert {"level 1: graphs of steps give what linears made for its formats give",
            "weights of level 0 are back, byte by byte"} <= set(found)  # fmt: skip


def test_t6_notices_pages_of_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a swapper that maps what nobody asked for, which a model that was never compared does not show."""
    original = WeightArena.load

    def load(self: WeightArena, parts: Parts) -> None:
        if threading.current_thread() is not threading.main_thread():
            parts = [part._replace(layer=1 - part.layer) for part in parts]
        original(self, parts)

    monkeypatch.setattr(WeightArena, "load", load)
    assert "level 1: graphs of steps give what linears made for its formats give" in missed(dry("t6"))


def test_t6_notices_graphs_of_another_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: layers that switch while the graphs of before are replayed."""
    monkeypatch.setattr(GraphSets, "switch", lambda self, formats: True)
    assert "level 0 after a climb, bit by bit" in missed(dry("t6"))


def test_t6_notices_pages_that_stay_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a page of a layer that is away which nobody can use."""
    original = WeightArena.unload
    monkeypatch.setattr(WeightArena, "unload", lambda self, parts: original(self, parts[1:]))
    findings = dry("t6")
    assert "pages" in findings.error or "level 1: no page is lost" in missed(findings)


def test_t6_notices_kv_that_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: pages that layers give up for nothing."""
    original = ElasticCache.map
    monkeypatch.setattr(ElasticCache, "map", lambda self, num_blocks: original(self, min(num_blocks, 16)))
    assert "level 1: KV has grown" in missed(dry("t6"))


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
    base = lambda self, layer, name, fmt, tensors: BaseLinear(self._make(layer, name))  # noqa: E731
    monkeypatch.setattr(MiniRank, "_build", base)
    assert missed(dry("t6")) == ["graph sets differ"]


def test_t6_fails_when_the_thread_beside_decode_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a move that died in its thread and counts as hidden behind decode."""
    calls = iter(range(100))

    def refuse(arena: WeightArena, parts: Parts) -> None:
        if next(calls) >= 4:  # the climb and its way back have passed
            raise RuntimeError("no memory mapped")

    monkeypatch.setattr(WeightArena, "load", load_with(refuse))
    findings = dry("t6")
    assert findings.error == "RuntimeError: no memory mapped"
    assert "level 0 after a climb, bit by bit" in {verdict.name for verdict in findings.verdicts if verdict.ok}


def test_t7_notices_a_switch_that_switches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an artefact that has the weights of one level in it."""
    monkeypatch.setattr(opaque._Model, "switch", lambda self, num_layers: None)
    assert "2 layers quantized show" in missed(dry("t7"))


@pytest.mark.parametrize("broken", ["switch", "land", "copy"])
def test_t7_notices_pieces_of_another_level(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: graphs of other formats, or graphs that leave their results where no other looks for them."""
    if broken == "switch":
        monkeypatch.setattr(GraphSets, "switch", lambda self, formats: True)
    else:
        monkeypatch.setattr(output_alias, "land", lambda output, home: output if broken == "land" else home)
    found = missed(dry("t7"))
    differ = "pieces of several levels in one step give what the layers give"
    assert (differ if broken != "land" else "every piece has a graph at every level") in found


def test_t6_notices_pieces_that_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: graphs of pieces beside which those of level 0 read what an earlier step left."""
    monkeypatch.setattr(output_alias, "land", lambda output, home: home)
    assert "level 1: and so do graphs of pieces" in missed(dry("t6"))


def test_the_8b_shape_is_the_one_the_kernels_are_measured_on() -> None:
    """Guards: figures of kernels and of engines that speak of different models."""
    config = MODELS["8B shape"]
    shape = Shape()
    assert kernels.SHAPES == {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
    assert (config["hidden_size"], config["intermediate_size"]) == (shape.hidden, shape.inner)
    assert sum(n * k * 2 for n, k in kernels.SHAPES.values()) == 436_207_616
