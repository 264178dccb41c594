"""One page of metrics for several engines, and the status of each."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.parser import text_string_to_metric_families
from vllm.entrypoints.serve.instrumentator import metrics as vllm_metrics
from vllm.plugins.endpoint_plugins import interface

from morphserve.integration.server.metrics import MorphServeEndpoint, StatusCollector
from morphserve.integration.server.poll import StatusPoll

pytestmark = pytest.mark.seams


def status(engine: int, level: int) -> dict[str, Any]:
    return {
        "engine": engine,
        "exposure_level": level,
        "target_level": level,
        "num_kv_blocks": 49 + 10 * level,
        "mapped_kv_blocks": 49 + 10 * level,
        "used_kv_blocks": level,
        "layers_by_format": {"w8": level} if level else {"base": 6},
        "ledger": {"budget_bytes": 1000, "weights_bytes": 900 - level},
        "predictions": "learned" if level else None,
        "pause_ms": {"count": level, "p50": None, "max": 2.5 if level else None},
        "failed": bool(level),
        "transitions": {"degrade_committed": level} if level else {},
        "tokens_by_level": {"0": 5, "1": level},
        "transition_seconds": 0.5 * level,
        "decisions_dropped": 7 * level,
        "errors": {"prepare": level} if level else {},
        "policy": {"kind": "threshold", "reloads": level, "refused": 2 * level},
        "controller_time": {"edges_s": [0.001], "counts": [3, level], "sum_s": 0.1},
    }


def samples(statuses: list[dict[str, Any]]) -> dict[tuple[str, ...], float]:
    async def ask() -> list[dict[str, Any]]:
        return statuses

    poll, registry = StatusPoll(ask), CollectorRegistry()
    asyncio.run(poll.latest())
    registry.register(StatusCollector(poll))
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_engines_are_told_apart() -> None:
    """Guards: replicas whose figures are added up, overwrite each other, or make two families of one name."""
    found = samples([status(0, 0), status(1, 3)])
    assert found["morphserve:level", "engine=0"] == 0 and found["morphserve:level", "engine=1"] == 3
    assert found["morphserve:kv_blocks", "engine=1", "state=published"] == 79
    assert found["morphserve:kv_blocks", "engine=0", "state=used"] == 0
    assert found["morphserve:transitions_total", "direction=degrade", "engine=1", "outcome=committed"] == 3
    assert ("morphserve:pause_ms_max", "engine=0") not in found and found["morphserve:pause_ms_max", "engine=1"] == 2.5
    assert found["morphserve:failed", "engine=0"] == 0 and found["morphserve:failed", "engine=1"] == 1
    assert found["morphserve:controller_seconds_bucket", "engine=1", "le=+Inf"] == 6
    assert found["morphserve:controller_seconds_count", "engine=0"] == 3
    assert {at: found["morphserve:status_age_seconds", f"engine={at}"] < 60 for at in (0, 1)} == {0: True, 1: True}
    assert found["morphserve:decisions_dropped_total", "engine=1"] == 21
    assert found["morphserve:policy_reloads_total", "engine=1", "outcome=ok"] == 3
    assert found["morphserve:policy_reloads_total", "engine=1", "outcome=refused"] == 6
    states = {labels: value for labels, value in found.items() if labels[0] == "morphserve:predictions"}
    assert [labels for labels, value in states.items() if value] == [
        ("morphserve:predictions", "engine=1", "state=learned")
    ]
    assert len(states) == 8
    assert samples([]) == {}


@pytest.mark.parametrize("num_engines", [0, 1, 2])
def test_status_of_each_engine(num_engines: int) -> None:
    """Guards: the page of one replica shown for all, an order that changes, or another page for a single engine."""

    async def answer(method: str) -> list[Any]:
        assert method == "morphserve_status"
        return [status(i, i) for i in reversed(range(num_engines))] or [None]

    endpoint, app = MorphServeEndpoint(), FastAPI()
    endpoint.attach_router(app)
    endpoint._client = SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=answer))
    client = TestClient(app)
    page = client.get("/morphserve/status")
    if num_engines == 0:
        assert page.status_code == 503
        return
    engines = page.json()["engines"] if num_engines == 2 else [page.json()]
    assert [(engine["engine"], engine["exposure_level"]) for engine in engines] == [(i, i) for i in range(num_engines)]
    last = num_engines - 1
    assert client.get(f"/morphserve/status?engine={last}").json()["engine"] == last
    assert client.get(f"/morphserve/status?engine={num_engines}").status_code == 404
    assert len(asyncio.run(endpoint._ask())) == num_engines


def test_each_of_several_api_servers_has_all_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: with more API servers than one, as vLLM starts for replicas, /metrics is what they have written into
    files, and no `morphserve:*` is left of it, or no `vllm:*`."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    theirs = MmapedDict(str(tmp_path / "counter_1.db"))
    theirs.write_value(mmap_key("vllm:prompt_tokens", "vllm:prompt_tokens_total", [], [], "of theirs"), 7.0, 0.0)
    theirs.close()

    async def answer(method: str) -> list[Any]:
        return [status(0, 0), status(1, 3)]

    endpoint, app = MorphServeEndpoint(), FastAPI()
    endpoint._client = SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=answer))
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: [endpoint])
    vllm_metrics.attach_router(app)
    interface.attach_endpoint_plugins(app, ("generate",))
    client = TestClient(app)
    assert client.get("/morphserve/status").is_success
    for path in ("/metrics", "/metrics?"):
        page = client.get(path)
        assert page.headers["Content-Type"].startswith("text/plain; version=")
        families = {family.name: family for family in text_string_to_metric_families(page.text)}
        assert families["vllm:prompt_tokens"].samples[0].value == 7.0
        assert [sample.value for sample in families["morphserve:level"].samples] == [0.0, 3.0]
    assert len(families) == len({line.split()[2] for line in page.text.splitlines() if line.startswith("# TYPE")})
