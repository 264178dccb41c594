"""What the GPU check asks of vLLM, as far as that shows without an engine: arguments, model configs, the refusal."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm._custom_ops")

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from morphserve.config import parse_config  # noqa: E402
from morphserve.control import Controller  # noqa: E402
from morphserve.errors import MorphServeError  # noqa: E402
from morphserve.integration.offline import LevelEngine  # noqa: E402
from morphserve.integration.offline.gpu_smoke import VllmEngine  # noqa: E402
from morphserve.tools.gpucheck.engines import MODELS, settings, write_model  # noqa: E402
from morphserve.tools.gpucheck.parts.plugin import plugin_settings  # noqa: E402
from policies import MorphLevel  # noqa: E402


def test_vllm_takes_every_argument(tmp_path: Path) -> None:
    """Guards: a lent GPU that is spent on "unexpected keyword argument"."""
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(settings(tmp_path, 1 << 30, 24 << 30, 0.3, eager=True)) | {"additional_config"} <= fields
    for batch in (None, 3):
        found = parse_config(plugin_settings(tmp_path, batch=batch))
        assert found.ladder.steps is not None and found.transition.max_layers_per_step == batch


@pytest.mark.parametrize("name", MODELS)
def test_vllm_reads_the_model(name: str, tmp_path: Path) -> None:
    """Guards: a config that vLLM refuses, or reads as another model."""
    config = EngineArgs(**settings(write_model(tmp_path, name), 1 << 30, 24 << 30, 0.3)).create_model_config()
    assert config.architectures == ["LlamaForCausalLM"] and str(config.dtype) == "torch.bfloat16"
    assert config.get_total_num_hidden_layers() == MODELS[name]["num_hidden_layers"]
    assert config.get_total_num_kv_heads() == MODELS[name]["num_key_value_heads"]


class _Llm:
    """Answers as `vllm.LLM`; keeps what it was given."""

    made: dict[str, Any]
    morph: dict[str, Any] = {}  # what its scheduler has beside vLLM's

    def __init__(self, **arguments: Any) -> None:
        _Llm.made = arguments
        scheduler = SimpleNamespace(**self.morph)
        core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler), shutdown=lambda: None)
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(mode=3),
            scheduler_config=SimpleNamespace(),
            cache_config=SimpleNamespace(),
        )
        self.llm_engine = SimpleNamespace(
            vllm_config=config, engine_core=core, has_unfinished_requests=lambda: False
        )

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
        assert len({tuple(prompt["prompt_token_ids"]) for prompt in prompts}) == len(prompts)
        outputs = [SimpleNamespace(token_ids=range(params.max_tokens))]
        return [SimpleNamespace(outputs=outputs) for _ in prompts]


def test_an_engine_is_asked_for_tokens_and_its_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a field that another vLLM lacks ending the part, and a stock engine that claims a status."""
    monkeypatch.setattr(vllm, "LLM", _Llm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")  # so that it is put back
    engine = VllmEngine(in_process=True, model="here")
    assert _Llm.made == {"model": "here"}
    assert engine.describe()["compilation_mode"] == "3" and "async_scheduling" not in engine.describe()
    assert engine.generate(5, 8, 3) == [[0, 1, 2]] * 5
    assert engine.status() == {}
    engine.stop()


def test_a_vllm_without_flashinfer_samples_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a start that ends in an ImportError on a machine that has no FlashInfer, as seen with 0.33 on a stub."""
    monkeypatch.setattr(vllm, "LLM", _Llm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")
    for found, before, after in ((None, None, "0"), (None, "1", "1"), (object(), None, None)):
        monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "to be put back")
        monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER")
        if before is not None:
            monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", before)
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        VllmEngine(model="here")
        assert os.environ.get("VLLM_USE_FLASHINFER_SAMPLER") == after


def test_a_level_is_asked_for_through_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a policy handed over by a name that the controller no longer has, or one that wants another level."""
    asked: list[tuple[Any, str, Any]] = []
    controller = SimpleNamespace(replace_policy=lambda *a: asked.append(a), level=0, in_transition=False)
    ladder = tuple(MorphLevel(index, (fmt, fmt), 1, 9) for index, fmt in enumerate(("base", "w8", "w4")))
    morph = SimpleNamespace(
        controller=controller, pool=SimpleNamespace(num_kv_blocks=9), runtime=SimpleNamespace(ladder=ladder)
    )
    monkeypatch.setattr(_Llm, "morph", {"morph": morph})
    monkeypatch.setattr(vllm, "LLM", _Llm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")
    engine = VllmEngine(in_process=True, model="here")
    steps: list[int] = []

    def step() -> None:  # the transition takes three
        steps.append(len(steps))
        controller.level = 2 if asked and len(steps) >= wanted_at + 3 else 0

    inner = engine._engine
    monkeypatch.setattr(inner, "step", step)
    monkeypatch.setattr(inner, "add", lambda prompt, max_tokens: None)
    monkeypatch.setattr(inner, "abort_all", lambda: None)
    monkeypatch.setattr(LevelEngine, "num_requests", 1)
    wanted_at = 108  # all requests decode, and steps of a quiet engine are timed
    took = engine.cross(2, 4, 8, 1000)
    assert [len(took[key]) for key in ("before_s", "beside_s", "after_s")] == [100, 3, 100]
    assert len(engine.steps(4, 8, 20)) == 20
    policy, _, setup = asked[0]
    assert policy.decide(None).level == 2 and setup.build(ladder).decide(None).level == 2
    controller.level = 0
    assert engine.status() == {"level": 0, "in_transition": False, "num_kv_blocks": 9, "deepest": 2}
    assert all(hasattr(Controller, name) for name in vars(controller))


def test_weights_that_vllm_makes_up_change_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: two levels that give the same tokens whatever their weights are, so that equal ones prove nothing."""
    from vllm.model_executor.model_loader import dummy_loader

    monkeypatch.setattr(vllm, "LLM", _Llm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")
    for _ in range(2):
        VllmEngine(model="here")
    weight, norm, ids = torch.zeros(64, 4096), torch.zeros(64), torch.zeros(3, dtype=torch.int64)
    for tensor in (weight, norm, ids):
        dummy_loader.initialize_single_dummy_weight(tensor)
    gain = (torch.nn.functional.linear(torch.ones(4096), weight)).std()
    assert 0.7 < gain < 1.4 and bool((norm == 1).all()) and not bool(ids.any())


def test_a_level_has_a_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a format that is taken for a level that has only some layers in it; steps for a level that is none."""
    asked: list[tuple[Any, str, Any]] = []
    state = SimpleNamespace(level=0, in_transition=False, failed=False)
    state.replace_policy = lambda *a: asked.append(a)
    formats = (("base", "base"), ("w8", "base"), ("w8", "w8"), ("w8", "w4"))
    ladder = tuple(MorphLevel(index, row, 1, 9) for index, row in enumerate(formats))
    runtime = SimpleNamespace(ladder=ladder)
    morph = SimpleNamespace(controller=state, runtime=runtime, wake_due=False, status=lambda: {"errors": {"policy": 1}})
    monkeypatch.setattr(_Llm, "morph", {"morph": morph})
    monkeypatch.setattr(vllm, "LLM", _Llm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")
    engine = LevelEngine("here")
    assert [engine.want(level) for level in ("w8", "deepest", 1, "base")] == [2, 3, 1, 0]
    with pytest.raises(ValueError, match="has no level of that name"):
        engine.want("w4")

    def step() -> None:
        assert morph.wake_due, "a core without requests makes no step that it was not asked for"
        state.level += 1

    engine.core.step_fn = step
    engine.set_level("w8")
    assert state.level == 2
    state.failed = True
    with pytest.raises(MorphServeError, match="level 0 is not reached.*at level 2, errors {'policy': 1}"):
        engine.set_level(0)
