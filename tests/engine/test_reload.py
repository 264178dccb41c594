"""An edited YAML under a real server: by the watch, by SIGHUP, by POST, in idle and in mid-burst."""

from __future__ import annotations

import http.client
import json
import os
import signal
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine.test_server import Server, serve

from morphserve.control.decisions.replay_log import replay
from morphserve.tools.admin.drain import main as drain_main
from morphserve.tools.admin.pin import main as pin_main
from morphserve.tools.admin.resume import main as resume_main

FULL = {"kind": "static", "level": 0}
W8 = {"kind": "static", "level": "w8"}
# Degrades as soon as anybody asks for something; restores when nobody does.
EAGER = {
    "kind": "threshold",
    "mode": "performance",
    "degrade_above": 0.05,
    "target_usage": 0.04,
    "restore_below": 0.02,
}


@pytest.fixture(scope="module")
def hangups_are_heard() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, children inherit that, and a server then leaves it so: not what is tested here."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@dataclass
class Edited:
    """A server, and the file it takes its policy from."""

    server: Server
    directory: Path
    settings: dict[str, Any]
    policies: list[str]  # that it has had, as the decision log names them

    def edit(self, **changes: Any) -> None:
        """As editors do that write beside the file and then move."""
        part = self.directory / "morph.yaml.part"
        part.write_text(yaml.safe_dump({**self.settings, **changes}))
        part.replace(self.directory / "morph.yaml")

    def said(self, words: str) -> int:
        return self.server.log.read_text().count(words)


@pytest.fixture(scope="module")
def edited(
    demo_model: Path, variant_cache: Path, tmp_path_factory: pytest.TempPathFactory, hangups_are_heard: None
) -> Iterator[Edited]:
    """One server for all tests; it begins at level 0 and stays there."""
    directory = tmp_path_factory.mktemp("reload")
    tokens = {"token_file": directory / "token", "read_token_file": directory / "reader"}
    for file in tokens.values():
        file.write_text(f"{file.name}-{'x' * 16}\n")
        file.chmod(0o600)
    settings = {
        "cache_dir": str(variant_cache), "policy": FULL, "transition": {"max_layers_per_step": 1},
        "admin": {key: str(file) for key, file in tokens.items()},
        "decision_log": str(directory / "decisions.jsonl"), "decision_log_detail": "all",
    }  # fmt: skip
    with serve(demo_model, directory, settings) as server:
        server.wait_until_healthy()
        server.token = tokens["token_file"].read_text().strip()
        yield Edited(server, directory, settings, ["static 0"])


def post(server: Server) -> tuple[int, dict[str, Any]]:
    """Status and body of POST /morphserve/reload."""
    try:
        return 200, json.loads(server.get("/morphserve/reload", {}))
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def test_idle_server_takes_an_edited_policy(edited: Edited) -> None:
    """Guards: an edit that needs a restart or a request, a bad file that changes the server, a SIGHUP that is unheard,
    or that ends the server when the terminal is closed."""
    server = edited.server
    page = server.status()
    assert page["level"] == 0
    assert (page["policy"]["kind"], page["policy"]["source"]) == ("static", str(edited.directory / "morph.yaml"))
    assert page["policy"]["reloads"] == page["policy"]["refused"] == 0

    edited.edit(policy=W8)
    server.wait_for("level 6 without a request", lambda: server.status()["level"] == 6)
    assert server.status()["policy"]["reloads"] == 1
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}
    assert json.loads(server.get("/v1/completions", body))["usage"]["completion_tokens"] == 12

    edited.edit(policy=FULL, kv={"max_preemptions": 1})
    server.wait_for("the refusal", lambda: server.status()["policy"]["refused"] == 1)
    assert "kv.max_preemptions" in server.status()["policy"]["last_error"]
    code, answer = post(server)
    assert code == 422 and not answer["ok"] and "restart" in answer["error"]
    assert answer["kind"] == "static" and server.status()["level"] == 6
    os.killpg(server.process.pid, signal.SIGHUP)  # as a closed terminal does, to engine core and workers too
    server.wait_for("the refusal of SIGHUP", lambda: server.status()["policy"]["refused"] == 3)
    server.wait_for("fresh metrics", lambda: server.metrics().get(("policy_reloads_total", "refused")) == 3)
    assert server.metrics()["policy_reloads_total", "ok"] == 1
    assert "but it is refused and the policy stays" in server.log.read_text()

    edited.edit(policy=FULL)
    code, answer = post(server)
    assert code == 200 and answer["ok"] and answer["changed"] == "policy.level"
    server.wait_for("level 0 without a request", lambda: server.status()["exposure_level"] == 0)
    page = server.status()
    assert page["policy"]["reloads"] == 2 and page["policy"]["last_error"] is None and not page["failed"]
    edited.policies += ["static w8", "static 0"]


def test_only_who_shows_its_token_reloads(edited: Edited) -> None:
    """Guards: a reload by whoever reaches the port of a real server, through vLLM's own middlewares."""
    server, token = edited.server, edited.server.token
    reloads = server.status()["policy"]
    try:
        for shown, status in (("", 401), (f"reader-{'x' * 16}", 401), (token[:-1], 401)):
            server.token = shown
            assert post(server)[0] == status
        server.token = f"reader-{'x' * 16}"
        assert server.status()["policy"] == reloads
        server.token = ""
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.status()
    finally:
        server.token = token


def test_an_operator_pins_and_drains_a_server(edited: Edited, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an order that an idle server takes with the next request; a drained server that lets requests in, or
    whose door stays shut; a server that the policy does not get back."""
    server = edited.server
    options = ["--url", f"http://127.0.0.1:{server.port}", "--token-file", str(edited.directory / "token")]
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}
    assert server.status()["level"] == 0
    assert pin_main(["w8", "--for", "600", "--cause", "a test of orders", *options]) == 0
    server.wait_for("level 6 without a request", lambda: server.status()["level"] == 6)
    assert json.loads(server.get("/v1/completions", body))["usage"]["completion_tokens"] == 12
    server.wait_for("fresh metrics", lambda: server.metrics().get(("order", "pin")) == 1)
    assert server.metrics()["orders_total", "pin"] == 1
    assert edited.said("order 1: pin level 6, for 600 s (a test of orders)") == 1
    assert pin_main(["99", "--for", "600", *options]) == 1
    assert "not on the ladder" in capsys.readouterr().err

    assert drain_main(options) == 0
    with pytest.raises(urllib.error.HTTPError, match="503"):
        server.get("/v1/completions", body)
    server.wait_for("level 0 without a request", lambda: server.status()["exposure_level"] == 0)
    state = json.loads(server.get("/morphserve/admin/state"))
    assert [engine["drained"] for engine in state["engines"]] == [True]
    assert resume_main(options) == 0
    assert json.loads(server.get("/v1/completions", body))["usage"]["completion_tokens"] == 12
    page = server.status()
    assert page["orders"]["order"] is None and page["level"] == 0 and not page["failed"] and not page["errors"]


def test_policy_is_replaced_in_mid_burst(edited: Edited) -> None:
    """Guards: a reload that loses requests, forces a restore in the burst, or breaks a transition under way."""
    server, said = edited.server, edited.said
    reloads = server.status()["policy"]["reloads"]
    edited.edit(policy=EAGER)
    server.wait_for("the eager policy", lambda: server.status()["policy"]["reloads"] == reloads + 1)
    body = json.dumps({"model": "demo", "prompt": "Once upon a time " * 40, "max_tokens": 300, "ignore_eos": True})
    for burst, (how, after_s) in enumerate((("watch", 1.0), ("SIGHUP", 0.5))):
        degraded, replaced = said(": level 0 ->"), said("morph: another policy at level")
        clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(12)]
        for client in clients:
            client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        server.wait_for("a transition", lambda before=degraded: said(": level 0 ->") > before, 0.002)
        edited.edit(policy={**EAGER, "restore_after_s": after_s})
        if how == "SIGHUP":
            os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for("the new policy", lambda before=replaced: said("morph: another policy at level") > before)
        for client in clients:
            assert json.loads(client.getresponse().read())["usage"]["completion_tokens"] == 300
            client.close()
        server.wait_for("level 0", lambda: server.status()["exposure_level"] == 0)
        page = server.status()
        assert page["policy"]["reloads"] == reloads + burst + 2
        assert page["policy"]["note"] == "policy.restore_after_s"
        assert f"policy.restore_after_s {(None, 1.0)[burst]} -> {after_s}" in server.log.read_text()
        assert not page["failed"] and not page["errors"]
        assert not any(key.endswith("aborted") for key in page["transitions"])
    edited.policies += ["threshold performance"] * 3


def test_the_log_tells_every_policy(edited: Edited) -> None:
    """Guards: a log of several policies that cannot be replayed; a server that reloading keeps from ending."""
    assert edited.server.terminate() == 0
    assert edited.server.processes() == []
    found = replay(edited.directory / "decisions.jsonl")
    assert found.agrees and found.policies == edited.policies, found
    if "threshold performance" in edited.policies:
        assert found.compared > 600 and len(found.logged_levels) > 1
