"""Which formats of a ladder a rank serves, and what it says about the others."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm._custom_ops")

import torch  # noqa: E402

from morphserve.config import parse_config  # noqa: E402
from morphserve.control import RankBytes  # noqa: E402
from morphserve.errors import ConfigError  # noqa: E402
from morphserve.integration.describe import RankDescription  # noqa: E402
from morphserve.integration.engine import wiring  # noqa: E402
from morphserve.integration.engine.runtime import EngineRuntime  # noqa: E402
from morphserve.integration.worker import sources  # noqa: E402
from morphserve.integration.worker.sources import Choice, Needs, choose_kernels  # noqa: E402
from quant_layers import KernelError  # noqa: E402

MEASURED = {"ladder": {"expected_kl": {"w4": 0.1}}}
OPTIONAL = {"ladder": {"steps": [{"format": fmt, "optional": True} for fmt in ("w8", "w4")]}}


def choose(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], failing: set[str]) -> Choice:
    def planted(fmt: str, *_: Any) -> Any:
        if fmt in failing:
            raise KernelError(f"no kernel can run {fmt}")
        return SimpleNamespace(name=f"some_{fmt}")

    monkeypatch.setattr(sources, "choose", planted)
    return choose_kernels(parse_config(settings), ["w8", "w4"], Needs(torch.float32))


@pytest.mark.parametrize("settings", [MEASURED, OPTIONAL])
@pytest.mark.parametrize("missing", ["w8", "w4"])
def test_a_ladder_that_nobody_wrote_down_does_without(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], missing: str
) -> None:
    """Guards: default and demo settings that do not start on a machine without a kernel for one of their formats."""
    (kept,) = {"w8", "w4"} - {missing}
    choice = choose(monkeypatch, settings, {missing})
    assert [kernel.name for kernel in choice.kernels.values()] == [f"some_{kept}"]
    assert choice.left_out == {missing: f"no kernel can run {missing}"}
    assert choose(monkeypatch, settings, set()).left_out == {}


@pytest.mark.parametrize(
    "named",
    [
        {"ladder": {"steps": [{"format": "w8"}, {"format": "w4"}]}},
        {"kernels": {"w4": "w4a16"}},
        {"variants": {"w4": "/some/checkpoint"}},
    ],
)
def test_what_the_user_names_is_refused(monkeypatch: pytest.MonkeyPatch, named: dict[str, Any]) -> None:
    """Guards: a checkpoint, a kernel or a step that somebody asked for, left out with a line in a log."""
    with pytest.raises(ConfigError, match="no kernel can run w4 Take that format out of ladder.steps"):
        choose(monkeypatch, named, {"w4"})


def test_a_ladder_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server that can never leave level 0, or an empty list of steps deep inside of a worker."""
    with pytest.raises(ConfigError, match="no format .* run w8; no kernel can run w4. .*check.* such a --dtype"):
        choose(monkeypatch, MEASURED, {"w8", "w4"})


def runtime(index: int, left_out: dict[str, str]) -> EngineRuntime:
    """Of replica `index`, whose two ranks have left out the same."""
    sizes = {fmt: (100,) * 4 for fmt in ("base", "w8", "w4") if fmt not in left_out}
    kernels = {fmt: f"some_{fmt}" for fmt in ("w8", "w4") if fmt not in left_out}
    ranks = [RankDescription(rank, sizes, 10, kernels, left_out=left_out) for rank in range(2)]
    executor = SimpleNamespace(collective_rpc=lambda method: ranks)
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=index))
    return EngineRuntime(SimpleNamespace(model_executor=executor), vllm_config, parse_config({}))


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("log.jsonl", "log.1.jsonl"), ("log.jsonl.gz", "log.1.jsonl.gz"), ("log.gz", "log.1.gz"), ("log", "log.1"),
        ("a.b.jsonl", "a.b.1.jsonl"),
    ],
)  # fmt: skip
def test_replicas_write_logs_of_their_own(name: str, second: str) -> None:
    """Guards: two engines that write into one another's lines; a compressed log under a name that does not say so."""
    for index, expected in ((0, name), (1, second)):
        replica = runtime(index, {})
        replica.config = replica.config.model_copy(update={"decision_log": Path("logs", name)})
        assert replica.decision_log == Path("logs", expected)


def test_one_warning_says_what_the_ladder_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: levels in a format that the ranks have left out; a warning of each rank and replica, or none."""
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.morphserve"), "warning", lambda text, *args: said.append(text % args))
    runtimes = [runtime(index, {"w4": "no kernel can run w4"}) for index in range(2)]
    runtime(0, {})
    assert said == ["morphserve: the ladder does without w4: no kernel can run w4. It has w8."]
    for each in runtimes:
        assert isinstance(each.config.ladder.steps, list)
        assert [step.format for step in each.config.ladder.steps] == ["w8"] and each.stated.ladder.steps is None


def test_the_engine_says_what_its_ladder_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a note that is written and never said; one of each replica."""
    said: list[tuple[int, str]] = []
    log = logging.getLogger("vllm.morphserve")
    monkeypatch.setattr(log, "log", lambda level, text, *args: said.append((level, text % args)))
    monkeypatch.setattr(wiring, "_RUNTIMES", {})
    monkeypatch.setattr(wiring, "for_this_device", lambda config, vllm_config: config)
    monkeypatch.setattr(wiring, "ladder_note", lambda config, vllm_config: (logging.WARNING, "level 0 alone"))
    for index in range(2):
        monkeypatch.setattr(wiring, "EngineRuntime", lambda *_, index=index: SimpleNamespace(index=index))
        start = wiring._initialize_kv_caches(lambda core, vllm_config: None)
        start(None, SimpleNamespace(additional_config={"morphserve": {}}))
    assert said == [(logging.WARNING, "morphserve: level 0 alone.")]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"kind": "threshold", "max_level": "8bit"}, "max_level 8bit allows level 0 alone of a ladder down to w4"),
        ({"kind": "slo", "mode": "accuracy"}, "mode accuracy allows level 0 alone of a ladder down to w4"),
        ({"kind": "threshold"}, ""),
        ({"kind": "static", "level": 0}, ""),
        ({"kind": "threshold", "max_level": "w8"}, ""),
    ],
)
def test_a_policy_that_stays_at_level_0_is_told_of(
    monkeypatch: pytest.MonkeyPatch, policy: dict[str, Any], words: str
) -> None:
    """Guards: a server that silently never morphs, because the only smaller format has fewer bits than is allowed."""
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.morphserve"), "warning", lambda text, *args: said.append(text % args))
    engine = runtime(0, {})
    engine.vllm_config.model_config = SimpleNamespace(get_total_num_hidden_layers=lambda: 2)  # type: ignore[assignment]
    engine.rank_bytes, engine.base_num_blocks = [RankBytes({"base": [100] * 2, "w8": [60] * 2, "w4": [40] * 2}, 10)], 9
    engine.config = parse_config({"policy": policy, "ladder": {"steps": [{"format": "w4"}]}})
    engine.ladder = engine._ladder()
    engine._warn_of_rest()
    assert len(engine.ladder) == 2
    engine.vllm_config.parallel_config.data_parallel_index = 1  # another replica says nothing that the first has said
    engine._warn_of_rest()
    engine.vllm_config.parallel_config.data_parallel_index = 0
    nothing = engine.config.ladder.model_copy(update={"steps": []})  # level 0 alone, whatever the policy allows
    engine.config = engine.config.model_copy(update={"ladder": nothing})
    engine.ladder = engine._ladder()
    engine._warn_of_rest()
    assert len(engine.ladder) == 1
    assert len(said) == bool(words) and words in "".join(said)
