"""The parts of scripts/gpu_check.py that ask engines, with stand-ins for these."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from morphserve.tools.gpucheck.bench import Bench, run_part
from morphserve.tools.gpucheck.engines import EngineError, EngineProcess, StandIn, settings
from morphserve.tools.gpucheck.frame import judge
from morphserve.tools.gpucheck.parts import plugin, vllm


def missed(part: ModuleType, required: bool = True, of: str = "run") -> list[str]:
    """Criteria that do not hold in a dry run."""
    findings = run_part(f"{part.__name__}:{of}", Bench("cpu", True, 300.0))
    assert findings.error == ""
    return [verdict.name for verdict in findings.verdicts if verdict.required == required and not verdict.ok]


@pytest.mark.parametrize(("gib", "share"), [(141, 0.1702), (80, 0.3), (24, 0.3)])
def test_an_engine_asks_for_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: int, share: float
) -> None:
    """Guards: engines side by side on a large device that refuse to start; on a small one, a share above all of it."""
    monkeypatch.setattr("morphserve.tools.gpucheck.engines.device_bytes", lambda: gib << 30)
    assert settings(tmp_path, 1 << 30, 24 << 30, 0.3)["gpu_memory_utilization"] == share


def test_t8_notices_tokens_that_do_not_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an engine whose answers depend on the run, taken for one whose level 0 can be compared."""
    (tmp_path / "restless.py").write_text(
        "from morphserve.tools.gpucheck.engines import StandIn\n"
        "class Engine(StandIn):\n"
        "    def generate(self, *sizes):\n"
        "        self._level += 1\n"
        "        return super().generate(*sizes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vllm, "STAND_IN", "restless:Engine")
    assert missed(vllm, required=False) == ["small: greedy tokens repeat", "8B shape: greedy tokens repeat"]
    monkeypatch.setattr(vllm, "STAND_IN", "no_such_module:Engine")
    assert missed(vllm) == ["small: starts and answers", "8B shape: starts and answers"]


@pytest.mark.parametrize("case", ["eager", "compiled", "large"])
def test_t9_notices_other_tokens_and_a_kv_that_does_not_grow(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Guards: a way back to level 0 that nobody compared with the way out."""
    class Stuck(EngineProcess):
        """After the first change of level, one token is another; KV stays as it was."""

        changed = False

        def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
            answer = super().ask(method, *args, timeout_s=timeout_s)
            if method == "cross":
                self.changed = True
            if method == "generate" and self.changed:
                answer[0][0] += 1
            return answer | {"num_kv_blocks": 100} if method == "status" else answer

    monkeypatch.setattr(plugin, "EngineProcess", Stuck)
    wrong = ["turn 0: KV grew by what layers gave up", "turn 0: the same tokens before and after"]
    more = [f"3 layers at a time: {name}" for name in wrong] if case == "large" else []
    assert missed(plugin, of=case) == [*wrong, "level 0 gives the stock server's tokens", *more]


def test_t9_notices_a_level_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: figures of a transition that requests outlived, or that never was."""

    class Slow(EngineProcess):
        def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
            answer = super().ask(method, *args, timeout_s=timeout_s)
            return answer | {"in_transition": True} if method == "status" else answer

    monkeypatch.setattr(plugin, "EngineProcess", Slow)
    findings = run_part(f"{plugin.__name__}:eager", Bench("cpu", True, 300.0))
    assert "EngineError: level 2 is not reached while 32 requests decode" in findings.error


@pytest.mark.parametrize(("part", "of"), [(vllm, "run"), (plugin, "large")])
def test_an_engine_that_is_not_up_in_time_is_no_failure(
    part: ModuleType, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a lent GPU reported as one that does not serve, because a compiler was slow."""
    (tmp_path / "slow_engine.py").write_text(
        "import threading\nclass Slow:\n    def __init__(self, **arguments): threading.Event().wait()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for module in (vllm, plugin):
        monkeypatch.setattr(module, "engine_factory", lambda bench: "slow_engine:Slow")
    monkeypatch.setattr("morphserve.tools.gpucheck.engines._STOP_S", 0.2)
    findings = run_part(f"{part.__name__}:{of}", Bench("cpu", True, 0.5, is_cut=True))
    assert judge(findings, 0, 1.0) == ("no time", "start: no answer in 0 s. Run the part alone.")
    findings = run_part(f"{part.__name__}:{of}", Bench("cpu", True, 0.5))
    assert judge(findings, 0, 1.0) == ("failed", "start: no answer in 0 s."), "it had all the time that it gets"


def test_an_engine_that_fails_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a part that waits for ever for an engine that is gone."""
    (tmp_path / "odd_engines.py").write_text(
        "import os, threading\n"
        "class Dies:\n"
        "    def describe(self): os._exit(7)\n"
        "class Mute:\n"
        "    def describe(self): threading.Event().wait()\n"
        "class Refuses:\n"
        "    def __init__(self): raise SystemExit('no such model')\n"
        "class Fails:\n"
        "    def describe(self): raise KeyError('it')\n"
        "    def stop(self): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("morphserve.tools.gpucheck.engines._STOP_S", 0.5)
    for name, words in (
        ("Dies", "describe: the engine's process ended, exit code 7"),
        ("Mute", "describe: no answer in 1 s"),
        ("Refuses", "start: SystemExit: no such model"),
        ("Fails", "describe: KeyError: 'it'"),
    ):
        with EngineProcess(f"odd_engines:{name}", {}) as engine, pytest.raises(EngineError, match=words):
            engine.wait_ready(60)
            engine.ask("describe", timeout_s=60 if name != "Mute" else 1)


def test_only_an_engine_with_the_plugin_has_a_status() -> None:
    """Guards: a stand-in that behaves as no engine does."""
    assert StandIn().status() == {} and StandIn(additional_config={}).status()["level"] == 0
