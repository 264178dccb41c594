"""One page of metrics for several engines, and the status of each."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.values import MultiProcessValue
from seams.asked import LOCAL, client_of, endpoint_of
from vllm.entrypoints.serve.instrumentator import metrics as vllm_metrics
from vllm.plugins.endpoint_plugins import interface

from morphserve.control import Direction, ErrorPlace, Outcome
from morphserve.integration.server import metrics
from morphserve.integration.server.metrics import MorphServeEndpoint, StatusCollector
from morphserve.integration.server.poll import StatusPoll
from morphserve.integration.server.scrape import Refusal, Refusals, add_to_own
from morphserve.shipped import MONITORING

pytestmark = pytest.mark.seams
_LIMITS = ("ttft", "tpot", "both")


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
        "late": dict(num_judged=4 * level, num_late=3 * level, num_late_ttft=2 * level, num_late_tpot=2 * level),
        "num_held": level,
        "num_held_total": 2 * level,
        "transition_seconds": 0.5 * level,
        "decisions_dropped": 7 * level,
        "errors": {"prepare": level} if level else {},
        "policy": dict(
            kind="threshold", source="a", serves="aa", reloads=level, refused=2 * level, last_error=None
        ),
        "recent_transitions": [],
        "orders": {"revision": 1, "order": {"kind": "pin", "level": 1} if level else None},
        "counters": {"orders": {"pin_taken": level} if level else {}},
        "controller_time": {"edges_s": [0.001], "counts": [3, level], "sum_s": 0.1},
    }


def samples(statuses: list[dict[str, Any]]) -> dict[tuple[str, ...], float]:
    async def ask() -> list[dict[str, Any]]:
        return statuses

    poll, registry = StatusPoll(ask), CollectorRegistry()
    asyncio.run(poll.look())
    registry.register(StatusCollector(poll))
    registry.register(Refusals().counter)
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_alerts_and_board_name_metrics_that_there_are() -> None:
    """Guards: an alert that never fires, or an empty panel, since a metric has another name or another label value."""
    exported = {labels[0] for labels in samples([status(0, 0), status(1, 3)])}
    alerts = [rule["expr"] for rule in yaml.safe_load(MONITORING[0].read_text())["groups"][0]["rules"]]
    panels = json.loads(MONITORING[1].read_text())["panels"]
    board = [target["expr"] for panel in panels for target in panel["targets"]]
    named = {name for expr in [*alerts, *board] for name in re.findall(r"\b\w+:\w+", expr)}
    assert named <= exported and len(alerts) > 5 and len(board) > 10
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported}
    assert families == {re.sub(r"_bucket$", "", name) for name in named}, "each is on the board, or in an alert"
    told = {labels[1:] for labels in samples([status(1, 3)])}
    values = {value for labels in told for value in labels if not value.startswith(("engine=", "le="))}
    of_state = set(re.findall(r'(?:state|outcome)="(\w+)"', " ".join([*alerts, *board])))
    assert of_state <= {value.partition("=")[2] for value in values} | {"aborted"}  # see `Outcome`


def test_counters_of_alerts_are_there_before_they_count() -> None:
    """Guards: a counter that is first seen at 1, in which nobody sees that it has risen."""
    found = samples([status(0, 0)])
    for direction, outcome in product(get_args(Direction), get_args(Outcome)):
        labels = f"direction={direction}", "engine=0", f"outcome={outcome}"
        assert found.pop(("morphserve:transitions_total", *labels)) == 0
    for place in get_args(ErrorPlace):
        assert found.pop(("morphserve:errors_total", "engine=0", f"where={place}")) == 0
    for reason in get_args(Refusal):
        assert found.pop(("morphserve:requests_refused_total", f"reason={reason}")) == 0
    for limit in _LIMITS:
        assert found.pop(("morphserve:requests_late_total", "engine=0", f"limit={limit}")) == 0
    for name in ("requests_judged_total", "requests_held_total"):
        assert found.pop((f"morphserve:{name}", "engine=0")) == 0
    assert not {labels[0] for labels in found} & {"morphserve:transitions_total", "morphserve:errors_total"}
    assert samples([status(1, 3)])["morphserve:errors_total", "engine=1", "where=prepare"] == 3


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
    assert len(states) == 10
    kinds = {labels[2]: value for labels, value in found.items() if labels[:2] == ("morphserve:policy", "engine=0")}
    assert kinds == {"kind=static": 0, "kind=threshold": 1, "kind=slo": 0}
    assert [found["morphserve:order", f"engine={engine}", "kind=pin"] for engine in (0, 1)] == [0, 1]
    assert found["morphserve:order", "engine=1", "kind=drain"] == 0
    assert found["morphserve:orders_total", "engine=1", "kind=pin", "outcome=taken"] == 3
    late = {limit: found["morphserve:requests_late_total", "engine=1", f"limit={limit}"] for limit in _LIMITS}
    assert late == {"ttft": 3, "tpot": 3, "both": 3} and found["morphserve:requests_judged_total", "engine=1"] == 12
    held = found["morphserve:num_requests_held", "engine=1"], found["morphserve:requests_held_total", "engine=1"]
    assert held == (3, 6)
    assert {labels[0] for labels in samples([])} == {"morphserve:requests_refused_total"}


@pytest.mark.parametrize("num_engines", [0, 1, 2])
def test_status_of_each_engine(num_engines: int) -> None:
    """Guards: the page of one replica shown for all, or another page for a single engine."""
    client = client_of(endpoint_of(statuses=[status(i, i) for i in range(num_engines)]))
    page = client.get("/morphserve/status")
    if num_engines == 0:
        assert page.status_code == 503
        return
    engines = page.json()["engines"] if num_engines == 2 else [page.json()]
    assert [(engine["engine"], engine["exposure_level"]) for engine in engines] == [(i, i) for i in range(num_engines)]
    last = num_engines - 1
    assert client.get(f"/morphserve/status?engine={last}").json()["engine"] == last
    assert client.get(f"/morphserve/status?engine={num_engines}").status_code == 404


def test_engines_answer_in_their_order() -> None:
    """Guards: an order that changes from poll to poll; an engine without the plugin among the others."""

    async def answer(method: str) -> list[Any]:
        assert method == "morphserve_status"
        return [{**status(at, at), "max_queued_tokens": None} if at >= 0 else None for at in (1, -1, 0)]

    assert [found["engine"] for found in asyncio.run(endpoint_of(answer).look())] == [0, 1]


def test_each_of_several_api_servers_has_all_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: with more API servers than one, as vLLM starts for replicas, /metrics is what they have written into
    files, and no `morphserve:*` is left of it, or no `vllm:*`."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    theirs = MmapedDict(str(tmp_path / "counter_1.db"))
    theirs.write_value(mmap_key("vllm:prompt_tokens", "vllm:prompt_tokens_total", [], [], "of theirs"), 7.0, 0.0)
    theirs.close()

    for process in (1, 2):  # each API server counts what it refuses itself
        monkeypatch.setattr("prometheus_client.values.ValueClass", MultiProcessValue(lambda p=process: p))
        endpoint = endpoint_of(statuses=[status(0, 0), status(1, 3)])
        endpoint._refusals.count("shed")
    app = FastAPI()
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: [endpoint])
    vllm_metrics.attach_router(app)
    interface.attach_endpoint_plugins(app, ("generate",))
    client = TestClient(app, base_url="http://127.0.0.1", client=LOCAL)
    assert client.get("/morphserve/status").is_success
    for path in ("/metrics", "/metrics?"):
        page = client.get(path)
        assert page.headers["Content-Type"].startswith("text/plain; version=")
        families = {family.name: family for family in text_string_to_metric_families(page.text)}
        assert families["vllm:prompt_tokens"].samples[0].value == 7.0
        assert [sample.value for sample in families["morphserve:level"].samples] == [0.0, 3.0]
        refused = families["morphserve:requests_refused"].samples
        assert {s.labels["reason"]: s.value for s in refused} == {"shed": 2, "drain": 0, "floor": 0}
    assert len(families) == len({line.split()[2] for line in page.text.splitlines() if line.startswith("# TYPE")})


def test_a_server_adds_its_figures_to_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a start after which /metrics has nothing of ours."""
    registry = CollectorRegistry()
    monkeypatch.setattr("morphserve.integration.server.scrape.REGISTRY", registry)
    monkeypatch.setattr(metrics, "on_hangup", lambda ask, tasks: False)

    async def answer(method: str) -> list[Any]:
        return [{**status(0, 2), "max_queued_tokens": None}]

    async def start() -> str:
        endpoint = MorphServeEndpoint()
        engine: Any = SimpleNamespace(
            engine_core=SimpleNamespace(call_utility_all_async=answer),
            vllm_config=SimpleNamespace(additional_config=None),
        )
        await endpoint.init_state(engine, None, None)
        await endpoint.look()
        for task in endpoint._tasks:
            task.cancel()
        return generate_latest(registry).decode()

    page = asyncio.run(start())
    assert 'morphserve:level{engine="0"} 2.0' in page
    assert 'morphserve:requests_refused_total{reason="floor"} 0.0' in page


def test_a_lone_api_server_says_each_figure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the page of a lone API server without our figures, or with each family twice, which no scraper takes."""
    registry = CollectorRegistry()
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    for owner in ("vllm.v1.metrics.prometheus", "morphserve.integration.server.scrape"):
        monkeypatch.setattr(f"{owner}.REGISTRY", registry)
    endpoint, app = endpoint_of(statuses=[status(0, 2)]), FastAPI()
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: [endpoint])
    vllm_metrics.attach_router(app)
    interface.attach_endpoint_plugins(app, ("generate",))
    add_to_own(endpoint._collector)
    page = TestClient(app, base_url="http://127.0.0.1", client=LOCAL).get("/metrics").text
    assert page.count("# TYPE morphserve:level gauge") == 1
    assert 'morphserve:level{engine="0"} 2.0' in page
