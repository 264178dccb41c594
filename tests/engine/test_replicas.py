"""Two data-parallel replicas of a dense model: two engines behind two API servers, each with a level of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from engine.rank_harness import needs_two_cores
from engine.test_reload import hangups_are_heard as hangups_are_heard
from engine.test_server import Server, serve
from prometheus_client.parser import text_string_to_metric_families

from morphserve.control.decisions.decision_log import Row
from morphserve.control.decisions.replay_log import read_log

pytestmark = needs_two_cores

# Degrades as soon as anybody asks for something; restores when nobody does.
POLICY = {
    "kind": "threshold",
    "mode": "performance",
    "degrade_above": 0.05,
    "target_usage": 0.04,
    "restore_below": 0.02,
}


def engines(server: Server) -> list[dict[str, Any]]:
    return list(server.status()["engines"])


def by_engine(server: Server, name: str) -> dict[str, float]:
    """A metric without other labels, or the sum over them."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            if sample.name == f"morphserve:{name}":
                engine = sample.labels["engine"]
                found[engine] = found.get(engine, 0) + sample.value
    return found


def test_replicas_morph_independently(
    short_model: Path,
    variant_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hangups_are_heard: None,
) -> None:
    """Guards: one replica's load moves another's level, their figures are mixed, or gone as there is an API server for
    each; a closed terminal ends the process above those, or vLLM's coordinator."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the tests' own binding is for one engine
    # vLLM 0.33 gives each replica a NUMA node of its own, unless this is set at all (docs/vllm.md).
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "0")
    log = tmp_path / "decisions.jsonl.gz"
    settings = {"cache_dir": str(variant_cache), "policy": POLICY, "decision_log": str(log)}
    with serve(short_model, tmp_path, settings, "--data-parallel-size", "2") as server:
        server.wait_until_healthy()
        assert [(engine["engine"], engine["level"]) for engine in engines(server)] == [(0, 0), (1, 0)]
        body = json.dumps({"model": "demo", "prompt": "Once upon a time " * 40, "max_tokens": 100, "ignore_eos": True})
        clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(8)]
        for client in clients:
            headers = {"Content-Type": "application/json", "X-data-parallel-rank": "1"}
            client.request("POST", "/v1/completions", body, headers)
        for client in clients:
            assert json.loads(client.getresponse().read())["usage"]["completion_tokens"] == 100
        idle, busy = engines(server)
        assert idle["level"] == 0 and idle["num_kv_blocks"] == 49 and not idle["transitions"]
        assert busy["transitions"]["degrade_committed"] == 1
        server.wait_for("the way back", lambda: "restore_committed" in engines(server)[1]["transitions"])
        idle, busy = engines(server)
        assert busy["level"] == 0 and not idle["transitions"]
        assert (idle["num_kv_blocks"], busy["num_kv_blocks"]) == (49, 49)
        shown = json.loads(server.get("/morphserve/view"))["panels"]
        assert [(panel["title"], len(panel["changes"])) for panel in shown] == [("engine 0", 0), ("engine 1", 2)]
        # The gauges are polled: only when both transitions are in them are they of the state seen above.
        server.wait_for("fresh metrics", lambda: by_engine(server, "transitions_total") == {"0": 0, "1": 2})
        # Either API server may answer, and each has asked at its own time.
        server.wait_for("all tokens", lambda: by_engine(server, "tokens_total") == {"0": 0, "1": 800})
        server.wait_for("level 0", lambda: by_engine(server, "level") == {"0": 0, "1": 0})
        before = sorted(server.command_lines())
        os.killpg(server.process.pid, signal.SIGHUP)  # as a closed terminal does
        said = [f"SIGHUP, engine {engine}: " for engine in (0, 1)]
        server.wait_for("both reloads", lambda: all(server.log.read_text().count(line) == 2 for line in said))
        assert sorted(server.command_lines()) == before
        assert server.terminate() == 0
        assert server.processes() == []
    deepest = [
        max(line.decision.level for _, line in read_log(file) if isinstance(line, Row))
        for file in (log, log.with_name("decisions.1.jsonl.gz"))
    ]
    assert deepest[0] == 0 < deepest[1]
