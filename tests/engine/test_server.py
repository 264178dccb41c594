"""`vllm serve --plugin morphserve` from outside: status, metrics, and a clean end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine.harness import BATCH_TOKENS
from otlp import PROTOCOL, Collector
from prometheus_client.parser import text_string_to_metric_families

from morphserve.cpu_tier import best_dtype
from morphserve.integration.server.receipt_door import HEADER
from morphserve.status_view import UNTOLD

START_TIMEOUT_S = 300
EXIT_TIMEOUT_S = 120


class Server:
    """A server process in a session of its own, so that whatever it leaves behind can be found."""

    def __init__(self, model: Path, directory: Path, settings: dict[str, Any] | None, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--enforce-eager"]
        command += ["--served-model-name", "demo", "--port", str(self.port), "--host", "127.0.0.1"]
        command += ["--block-size", "32", "--num-gpu-blocks-override", "49", "--max-model-len", "512"]
        command += ["--max-num-seqs", "16", "--max-num-batched-tokens", str(BATCH_TOKENS), "--dtype", best_dtype()]
        command += arguments
        if settings is not None:
            file = directory / "morph.yaml"
            file.write_text(yaml.safe_dump(settings))
            command += ["--plugin", "morphserve", "--morphserve-config", str(file)]
        # In-process engines of other tests have set this; a server has processes.
        env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self.token = ""  # that every question shows, if there is one
        self.log = directory / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def _ask(self, path: str, body: dict[str, Any] | None, key: str = "") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        request.add_header("Content-Type", "application/json")
        if key or self.token:
            request.add_header("Authorization", f"Bearer {key or self.token}")
        return urllib.request.urlopen(request, timeout=60)

    def get(self, path: str, body: dict[str, Any] | None = None) -> str:
        with self._ask(path, body) as answer:
            return str(answer.read().decode())

    def headers(self, path: str, body: dict[str, Any], key: str = "") -> Message:
        """Headers of the answer."""
        with self._ask(path, body, key) as answer:
            return answer.headers

    def status(self) -> dict[str, Any]:
        """The status as it is from now on: that of the first poll that begins after the question."""
        begin = time.monotonic()
        while True:
            page = dict(json.loads(self.get("/morphserve/status")))
            if page.pop("age_s") <= time.monotonic() - begin:
                return page
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"exit code {self.process.wait(0.05)}:\n{self.log.read_text()[-4000:]}")

    def metrics(self) -> dict[tuple[str, str], float]:
        """morphserve:* samples by (name, value of the first label beside `engine`), the sum over further labels."""
        found: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            if family.name.startswith("morphserve:"):
                for sample in family.samples:
                    key = sample.name.removeprefix("morphserve:"), _first_label(sample.labels)
                    found[key] = found.get(key, 0) + sample.value
        return found

    def wait_for(self, what: str, check: Callable[[], bool], interval_s: float = 0.1) -> None:
        """Ask until `check` holds; the wait between two questions ends early if the server dies."""
        for _ in range(int(START_TIMEOUT_S / interval_s)):
            with suppress(urllib.error.URLError, ConnectionError):
                if check():
                    return
            with suppress(subprocess.TimeoutExpired):
                code = self.process.wait(interval_s)
                pytest.fail(f"exit code {code} before {what}:\n{self.log.read_text()[-4000:]}")
        pytest.fail(f"no {what} in {START_TIMEOUT_S} s:\n{self.log.read_text()[-4000:]}")

    def wait_until_healthy(self) -> None:
        self.wait_for("health", lambda: self.get("/health") == "")

    def terminate(self) -> int:
        """SIGTERM as an operator sends it, to the server alone; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(EXIT_TIMEOUT_S)

    def processes(self) -> list[str]:
        """Command lines of all processes of the server's session that still run."""
        return list(self.command_lines().values())

    def command_lines(self) -> dict[int, str]:
        """The same by process id.

        Without CPython's resource tracker, which ends by itself a moment after the process it belongs to, and
        without processes that have given up their memory, command line included: they are as good as gone.
        """
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found[int(stat.parent.name)] = stat.with_name("cmdline").read_text().replace("\0", " ")
        return {pid: line for pid, line in found.items() if line and "multiprocessing.resource_tracker" not in line}


def _first_label(labels: dict[str, str]) -> str:
    return next((value for name, value in labels.items() if name != "engine"), "")


@contextmanager
def serve(model: Path, directory: Path, settings: dict[str, Any] | None, *arguments: str) -> Iterator[Server]:
    server = Server(model, directory, settings, *arguments)
    try:
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where a server with `--otlp-traces-endpoint` sends its spans, as soon as they are made."""
    monkeypatch.setenv(*PROTOCOL)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    listening = Collector()
    yield listening
    listening.close()


def test_status_and_metrics_agree(
    demo_model: Path, variant_cache: Path, tmp_path: Path, collector: Collector
) -> None:
    """Guards: a static level waits for the first request, or metrics and engine differ."""
    who = {"keys": {"2bb80d537b1da3e3": 0}, "models": {"exact": 0}}
    policy = {"kind": "static", "level": "w8", "floors": {**who, "hold_s": 0, "when_spent": "refuse"}}
    settings = {"cache_dir": str(variant_cache), "policy": policy}
    arguments = ["--otlp-traces-endpoint", collector.url, "--served-model-name", "demo", "exact"]
    with serve(demo_model, tmp_path, settings, *arguments) as server:
        server.wait_until_healthy()
        server.wait_for("level 6 without a request", lambda: server.status()["level"] == 6)
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}
        answer = json.loads(server.get("/v1/completions", body))
        assert answer["usage"]["completion_tokens"] == 12
        server.wait_for("fresh metrics", lambda: server.metrics().get(("tokens_total", "6")) == 12)
        status, metrics = server.status(), server.metrics()
        blocks = status["ladder"][6]["num_kv_blocks"]
        assert blocks > 49 and status["num_kv_blocks"] == status["mapped_kv_blocks"] == blocks
        assert metrics["kv_blocks", "published"] == metrics["kv_blocks", "backed"] == blocks
        assert metrics["kv_blocks", "used"] == 0
        assert status["layers_by_format"] == {"w8": 30} and metrics["layers", "w8"] == 30
        assert metrics["level", ""] == metrics["target_level", ""] == 6 and metrics["failed", ""] == 0
        assert metrics["transitions_total", "degrade"] == status["transitions"]["degrade_committed"] == 1
        assert metrics["memory_bytes", "staging_bytes"] == 0 < metrics["memory_bytes", "weights_bytes"]
        assert answer["kv_transfer_params"] is None
        (change,) = status["recent_transitions"]
        assert (change["from_level"], change["to_level"], change["outcome"]) == (0, 6, "committed")
        assert status["num_running"] == status["num_waiting"] == 0
        assert status["late"]["num_ended"] == 1 and status["late"]["num_judged"] == 0, "static promises nothing"
        limited = {**body, "vllm_xargs": {"morphserve_ttft_s": 1e-6, "morphserve_tpot_s": 1e6}}
        server.get("/v1/completions", limited)
        late = server.status()["late"]
        assert (late["num_judged"], late["num_late"], late["num_late_ttft"], late["num_late_tpot"]) == (1, 1, 1, 0)
        metrics = server.metrics()
        assert metrics["requests_judged_total", ""] == metrics["requests_late_total", "ttft"] == 1
        assert metrics["requests_late_total", "both"] == metrics["requests_held_total", ""] == 0
        (shown,) = json.loads(server.get("/morphserve/view"))["panels"]
        assert UNTOLD not in {shown["summary"], *(line["text"] for line in shown["lines"] + shown["bars"])}
        assert "<title>MorphServe</title>" in server.get("/morphserve")
        asked = json.loads(server.get("/v1/completions", {**body, "vllm_xargs": {"morphserve_precision": "full"}}))
        receipt = asked["kv_transfer_params"]["morphserve"]
        assert receipt["demanded"] == "full" and not receipt["full_precision"]  # the level is 6, and it says so
        assert receipt["output_tokens"] == {"6": 12} and receipt["reused_tokens"] == {}
        _check_streamed_receipts(server, body)
        _check_floors(server, body)
        counts = server.metrics()
        assert counts["requests_refused_total", "floor"] == 2 and counts["requests_refused_total", "shed"] == 0
        assert counts["requests_held_total", ""] == server.status()["num_held_total"] > 0
        assert counts["num_requests_held", ""] == 0
        _check_spans(server, collector)
        assert server.processes()
        assert server.terminate() == 0
        assert server.processes() == []


def _check_spans(server: Server, collector: Collector) -> None:
    """Of a real engine's transition and of a request that asked for nothing, in the processes that make them."""
    server.wait_for("spans", lambda: collector.spans("morphserve.transition") and collector.spans("llm_request"))
    (_, transition), *_ = collector.spans("morphserve.transition")
    assert transition["vllm.process_kind"] == "engine_core" and transition["morphserve.outcome"] == "committed"
    assert (transition["morphserve.from_level"], transition["morphserve.to_level"]) == (0, 6)
    (_, request), *_ = collector.spans("llm_request")
    assert request["gen_ai.usage.completion_tokens"] == 12 and request["morphserve.degraded_share"] == 1.0
    assert request["morphserve.level.min"] == request["morphserve.level.deepest"] == 6


def _check_streamed_receipts(server: Server, body: dict[str, Any]) -> None:
    """Clients that stream, and those that read headers, get the receipt too; those that ask for none do not."""
    chat = {k: v for k, v in body.items() if k != "prompt"} | {"messages": [{"role": "user", "content": "Hello"}]}
    asked = {"stream": True, "vllm_xargs": {"morphserve_receipt": "tokens"}}
    for path, ask in (("/v1/completions", body), ("/v1/chat/completions", chat)):
        *_, before, last, done, rest = server.get(path, ask | asked).split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        chunk, text = (json.loads(line.removeprefix("data: ")) for line in (last, before))
        assert chunk["id"] == text["id"] and chunk["object"] == text["object"] and chunk["choices"] == []
        assert chunk["morphserve"]["token_levels"] == [[6, 12]] and not chunk["morphserve"]["full_precision"]
        assert "morphserve" not in server.get(path, ask | {"stream": True})
        header = server.headers(path, ask | {"vllm_xargs": {"morphserve_receipt": 1}})[HEADER]
        assert json.loads(header)["output_tokens"] == {"6": 12}
        assert HEADER not in server.headers(path, ask)
        several = ask | {"n": 3, "temperature": 1.0, "vllm_xargs": {"morphserve_receipt": 1}}
        *_, last, _, _ = server.get(path, several | {"stream": True}).split("\n\n")
        streamed = json.loads(last.removeprefix("data: "))["morphserve"]
        for told in (streamed, json.loads(server.headers(path, several)[HEADER])):
            assert [receipt["output_tokens"] for receipt in told] == 3 * [{"6": 12}]


def _check_floors(server: Server, body: dict[str, Any]) -> None:
    """Whose key may ask, or who names a model that may, is served at level 0, for which the engine comes back and then
    goes again; others at 6. While others are here and no seconds are left, he is refused before his answer begins."""
    asked = {**body, "vllm_xargs": {"morphserve_max_level": 0, "morphserve_receipt": 1}}
    assert json.loads(server.headers("/v1/completions", asked)[HEADER])["deepest_level"] == 6
    for ask, key in ((asked, "secret"), ({**asked, "model": "exact"}, "")):
        server.wait_for("an open door", lambda: server.status()["min_floor"] == 0)  # the request before has ended
        told = json.loads(server.headers("/v1/completions", ask, key=key)[HEADER])
        assert told["output_tokens"] == {"0": 12} and told["full_precision"]
        server.wait_for("level 6 again", lambda: server.status()["level"] == 6)
    assert server.status()["num_held"] == 0
    with server._ask("/v1/completions", {**body, "max_tokens": 450, "stream": True}) as other:
        other.readline()
        server.wait_for("a shut door", lambda: server.status()["min_floor"] == 6)
        for stream in (False, True):
            with pytest.raises(urllib.error.HTTPError) as refused:
                server.headers("/v1/completions", {**asked, "stream": stream}, key="secret")
            assert refused.value.code == 503 and int(refused.value.headers["Retry-After"]) > 0
            assert "policy.floors.hold_s" in json.loads(refused.value.read())["error"]["message"]
        assert server.headers("/v1/completions", body)["Retry-After"] is None, "who asks for nothing is served"
    server.wait_for("an open door", lambda: server.status()["min_floor"] == 0)
    assert json.loads(server.headers("/v1/completions", asked, key="secret")[HEADER])["output_tokens"] == {"0": 12}
    server.wait_for("level 6 again", lambda: server.status()["level"] == 6)


def test_sigterm_in_mid_transition(demo_model: Path, variant_cache: Path, tmp_path: Path) -> None:
    """Guards: a transition under way keeps the server from ending, or a rank outlives it."""
    settings = {
        "cache_dir": str(variant_cache),
        "transition": {"max_layers_per_step": 1},
        "policy": {
            "kind": "threshold",
            "mode": "performance",
            "degrade_above": 0.05,
            "target_usage": 0.04,
            "restore_below": 0.02,
        },
    }
    with serve(demo_model, tmp_path, settings) as server:
        server.wait_until_healthy()
        assert "morph r1:" not in server.log.read_text()
        body = json.dumps(
            {"model": "demo", "prompt": "Once upon a time " * 40, "max_tokens": 300, "ignore_eos": True}
        )
        clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(12)]
        for client in clients:
            client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        server.wait_for("a transition", lambda: "morph r1: level 0 ->" in server.log.read_text(), 0.002)
        assert "outcome=" not in server.log.read_text()
        server.process.send_signal(signal.SIGTERM)
        # Engine core and worker end at once. The API server, stock or not, waits for its clients.
        ranks = ("EngineCore", "VLLM::Worker")  # the titles vLLM gives its processes
        server.wait_for("the engine's end", lambda: not any(r in p for p in server.processes() for r in ranks))
        for client in clients:
            client.close()
        assert server.process.wait(EXIT_TIMEOUT_S) == 0
        assert server.processes() == []


def test_start_that_fails_ends_with_the_cause(demo_model: Path, tmp_path: Path) -> None:
    """Guards: what a worker met stands somewhere in the log, and its last line is of a stack that says nothing."""
    (tmp_path / "variants").touch()
    with serve(demo_model, tmp_path, {"cache_dir": str(tmp_path)}) as server:
        assert server.process.wait(START_TIMEOUT_S) == 1
        last = server.log.read_text().splitlines()[-1]
        assert last.startswith("morphserve: error: ") and "cannot create the variant directory" in last


def test_killed_worker_is_the_last_thing_said(demo_model: Path, variant_cache: Path, tmp_path: Path) -> None:
    """Guards: the system kills a worker for its memory, and the server ends as if nothing had been."""
    settings = {"cache_dir": str(variant_cache), "ladder": {"steps": [{"format": "w8"}]}}
    with serve(demo_model, tmp_path, settings) as server:
        server.wait_until_healthy()
        (worker,) = (pid for pid, line in server.command_lines().items() if "VLLM::Worker" in line)
        os.kill(worker, signal.SIGKILL)
        assert server.process.wait(EXIT_TIMEOUT_S) == 1, "or a supervisor takes it for a wish"
        last = server.log.read_text().splitlines()[-1]
        assert last.startswith("morphserve: error: vLLM's process ")
        # The second, where vLLM asks for the exit status before the system has it.
        assert "was killed (SIGKILL)" in last or "died and left no word" in last
        assert "Free some memory" in last and server.processes() == []
