"""A server that Prometheus scrapes, and what is done to it so that alerts fire; for check_monitoring.py.

What is done is a context: in its block the trouble lasts, behind it all is as it was.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from morphserve.commands import main as morphserve
from morphserve.errors import MorphServeError

_TOKEN = "a-token-of-this-check"
_POLICY = {"kind": "threshold", "degrade_above": 0.7, "target_usage": 0.6, "restore_below": 0.4, "restore_after_s": 1.0}
# Steps a hundred times faster than any machine makes them: each predicted wait is far from the one that comes.
_WRONG_TIMES = {
    "schema": 1,
    "formats": {
        fmt: {"base_s": 1e-4, "per_seq_s": 1e-6, "per_prefill_token_s": 1e-6, "per_context_token_s": 1e-9}
        for fmt in ("base", "w8", "w4")
    },
    "move": {"degrade_s": 1e-3, "restore_s": 1e-3},
    "offset_s": 0.0,
}
_SLO = {"kind": "slo", "ttft_s": 0.2, "tpot_s": 0.2}


@dataclass(slots=True)
class Stage:
    """The server, what it is made of, and Prometheus."""

    url: str
    pid: int
    directory: Path
    prometheus: str = ""  # its url
    clients: list[threading.Thread] = field(default_factory=list)

    @property
    def config(self) -> Path:
        """The settings that the server watches."""
        return self.directory / "morph.yaml"

    def prepare(self) -> None:
        """Write what the server is started with."""
        self.set_policy(_POLICY)
        (self.directory / "times.json").write_text(json.dumps(_WRONG_TIMES), encoding="utf-8")
        (self.directory / "token").touch(0o600)
        (self.directory / "token").write_text(_TOKEN, encoding="utf-8")

    def set_policy(self, policy: dict[str, Any]) -> None:
        """Edit the settings, in which only the policy ever changes."""
        settings = {
            "version": 1,
            "policy": policy,
            "cache_dir": str(self.directory / "cache"),
            "decision_log": str(self.directory / "decisions.jsonl"),
            "step_times": str(self.directory / "times.json"),
            "transition": {"backoff_s": 1.0},
            "admin": {"token_file": str(self.directory / "token")},
        }
        self.config.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def order(self, *words: str) -> None:
        """Order something as an operator does."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = morphserve([*words, "--url", self.url, "--token-file", str(self.directory / "token")])
        if code:
            raise MorphServeError(f"morphserve {' '.join(words)}: {said.getvalue().strip()}")

    def burst(self, num: int = 24, num_tokens: int = 120) -> None:
        """Send more requests than the KV cache holds at once, and go on."""
        before = [client for client in self.clients if client.is_alive()]
        self.clients = [threading.Thread(target=self._ask, args=(i, num_tokens), daemon=True) for i in range(num)]
        for client in self.clients:
            client.start()
        self.clients += before

    def ask_in_vain(self) -> None:
        """Send requests with a limit that no server keeps, one after the other, for some seconds."""
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            self._ask(0, 1, morphserve_ttft_s=1e-6)

    def _ask(self, number: int, num_tokens: int, **asked: float) -> None:
        prompt = [100 + (number * 31 + k) % 1000 for k in range(120)]
        body = {"model": "demo", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
        body |= {"vllm_xargs": asked} if asked else {}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()

    def query(self, path: str, **values: str | float) -> Any:
        """Ask Prometheus."""
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(values)}") as answer:
            return json.load(answer)["data"]

    def is_firing(self, alert: str) -> bool:
        """Return whether an alert fires now."""
        found = self.query("query", query=f'ALERTS{{alertname="{alert}",alertstate="firing"}}')
        return bool(found["result"])

    def is_silent(self, alert: str) -> bool:
        """Return whether it does not."""
        return not self.is_firing(alert)

    def series(self, expr: str, since_s: float) -> int:
        """Return how many series an expression has had since then."""
        return len(self.query("query_range", query=expr, start=since_s, end=time.time(), step=1)["result"])


@contextlib.contextmanager
def paused(stage: Stage) -> Iterator[None]:
    """Pause at a level below full precision."""
    stage.order("pin", "8bit", "--for", "600", "--cause", "check")
    while not stage.query("query", query="morphserve:level > 0")["result"]:
        time.sleep(0.5)
    stage.order("pause", "--cause", "check")
    yield
    stage.order("restore")
    stage.order("resume")


@contextlib.contextmanager
def refused_policy(stage: Stage) -> Iterator[None]:
    """Edit the policy into one that cannot be."""
    stage.set_policy({**_POLICY, "degrade_above": 7})
    yield
    stage.set_policy(_POLICY)


@contextlib.contextmanager
def changed_layers(stage: Stage) -> Iterator[None]:
    """Change a byte of each cached layer, and ask for them."""
    _flip(stage.directory / "cache")
    stage.order("pin", "8bit", "--for", "600")
    yield
    stage.order("resume")
    _flip(stage.directory / "cache")


def _flip(cache: Path) -> None:
    for path in cache.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x55]))


@contextlib.contextmanager
def no_files(stage: Stage) -> Iterator[None]:
    """Let the engine write no file, as on a full disk, while it has something to write."""
    core = _core(stage)
    before = resource.prlimit(core, resource.RLIMIT_FSIZE)
    resource.prlimit(core, resource.RLIMIT_FSIZE, (0, before[1]))
    stage.burst()
    yield
    resource.prlimit(core, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def wrong_times(stage: Stage) -> Iterator[None]:
    """Decide by step times of another world."""
    stage.set_policy(_SLO)
    time.sleep(2.0)  # two looks of the server's at the file
    stage.burst(48)
    yield
    stage.set_policy(_POLICY)


@contextlib.contextmanager
def late_requests(stage: Stage) -> Iterator[None]:
    """Ask for answers sooner than they can be."""
    stage.ask_in_vain()
    yield


@contextlib.contextmanager
def hanging(stage: Stage) -> Iterator[None]:
    """Stop the engine's process."""
    core = _core(stage)
    os.kill(core, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(core, signal.SIGCONT)


def _core(stage: Stage) -> int:
    """Return the engine core's process of the server's session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            session = int(stat.read_text().rpartition(")")[2].split()[3])
            if session == stage.pid and b"EngineCore" in (stat.parent / "cmdline").read_bytes():
                return int(stat.parent.name)
    raise MorphServeError("the server has no process named EngineCore")


# What brings it about |-> the alerts.
TROUBLE: tuple[tuple[Callable[[Stage], AbstractContextManager[None]], tuple[str, ...]], ...] = (
    (paused, ("MorphServeStaysDegraded",)),
    (refused_policy, ("MorphServePolicyRefused",)),
    (changed_layers, ("MorphServeTransitionsAborted", "MorphServeErrors")),
    (no_files, ("MorphServeDecisionsDropped",)),
    (wrong_times, ("MorphServePredictionsDistrusted",)),
    (late_requests, ("MorphServeRequestsLate",)),
    (hanging, ("MorphServeEngineSilent",)),
)
