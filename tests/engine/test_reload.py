"""An edited YAML under a real server: by the watch, by SIGHUP, by POST, in idle and in mid-burst."""

from __future__ import annotations

import http.client
import json
import os
import signal
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine.test_server import Server, serve

from morphserve.replay_log import replay

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


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, children inherit that, and a server then leaves it so: not what is tested here."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def edit(directory: Path, settings: dict[str, Any], **changes: Any) -> None:
    """As editors do that write beside the file and then move."""
    part = directory / "morph.yaml.part"
    part.write_text(yaml.safe_dump({**settings, **changes}))
    part.replace(directory / "morph.yaml")


def post(server: Server) -> tuple[int, dict[str, Any]]:
    """Status and body of POST /morphserve/reload."""
    try:
        return 200, json.loads(server.get("/morphserve/reload", {}))
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def test_idle_server_takes_an_edited_policy(demo_model: Path, variant_cache: Path, tmp_path: Path) -> None:
    """Guards: an edit that needs a restart or a request, a bad file that changes the server, an unheard SIGHUP."""
    log = tmp_path / "decisions.jsonl"
    settings = {
        "cache_dir": str(variant_cache), "policy": FULL, "decision_log": str(log), "decision_log_detail": "all",
    }  # fmt: skip
    with serve(demo_model, tmp_path, settings) as server:
        server.wait_until_healthy()
        page = server.status()
        assert page["level"] == 0
        assert (page["policy"]["kind"], page["policy"]["source"]) == ("static", str(tmp_path / "morph.yaml"))
        assert page["policy"]["reloads"] == page["policy"]["refused"] == 0

        edit(tmp_path, settings, policy=W8)
        server.wait_for("level 6 without a request", lambda: server.status()["level"] == 6)
        assert server.status()["policy"]["reloads"] == 1
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}
        assert json.loads(server.get("/v1/completions", body))["usage"]["completion_tokens"] == 12

        edit(tmp_path, settings, policy=FULL, kv={"max_preemptions": 1})
        server.wait_for("the refusal", lambda: server.status()["policy"]["refused"] == 1)
        assert "kv.max_preemptions" in server.status()["policy"]["last_error"]
        code, answer = post(server)
        assert code == 422 and not answer["ok"] and "restart" in answer["error"]
        assert answer["policy"] == W8 and server.status()["level"] == 6
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for("the refusal of SIGHUP", lambda: server.status()["policy"]["refused"] == 3)
        server.wait_for("fresh metrics", lambda: server.metrics().get(("policy_reloads_total", "refused")) == 3)
        assert server.metrics()["policy_reloads_total", "ok"] == 1
        assert "but it is refused and the policy stays" in server.log.read_text()

        edit(tmp_path, settings, policy=FULL)
        code, answer = post(server)
        assert code == 200 and answer["ok"] and answer["policy"] == FULL
        server.wait_for("level 0 without a request", lambda: server.status()["exposure_level"] == 0)
        page = server.status()
        assert page["policy"]["reloads"] == 2 and page["policy"]["last_error"] is None and not page["failed"]
        assert server.terminate() == 0
        assert server.processes() == []
    found = replay(log)
    assert found.agrees and found.policies == ["static 0", "static w8", "static 0"], found


def test_policy_is_replaced_in_mid_burst(demo_model: Path, variant_cache: Path, tmp_path: Path) -> None:
    """Guards: a reload that loses requests, forces a restore in the burst, or breaks a transition under way."""
    log = tmp_path / "decisions.jsonl"
    settings = {
        "cache_dir": str(variant_cache), "policy": EAGER, "transition": {"max_layers_per_step": 1},
        "decision_log": str(log), "decision_log_detail": "all",
    }  # fmt: skip
    with serve(demo_model, tmp_path, settings) as server:
        server.wait_until_healthy()

        def said(words: str) -> int:
            return server.log.read_text().count(words)

        body = json.dumps({"model": "demo", "prompt": "Once upon a time " * 40, "max_tokens": 300, "ignore_eos": True})
        for burst, (how, after_s) in enumerate((("watch", 1.0), ("SIGHUP", 0.5))):
            degraded = said(": level 0 ->")
            clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(12)]
            for client in clients:
                client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            server.wait_for("a transition", lambda before=degraded: said(": level 0 ->") > before, 0.002)
            edit(tmp_path, settings, policy={**EAGER, "restore_after_s": after_s})
            if how == "SIGHUP":
                os.kill(server.process.pid, signal.SIGHUP)
            server.wait_for("the new policy", lambda before=burst: said("morph: another policy at level") > before)
            for client in clients:
                assert json.loads(client.getresponse().read())["usage"]["completion_tokens"] == 300
                client.close()
            server.wait_for("level 0", lambda: server.status()["exposure_level"] == 0)
            page = server.status()
            assert page["policy"]["reloads"] == burst + 1
            assert page["policy"]["note"] == f"policy.restore_after_s {(None, 1.0)[burst]} -> {after_s}"
            assert not page["failed"] and not page["errors"]
            assert not any(key.endswith("aborted") for key in page["transitions"])
        assert server.terminate() == 0
    found = replay(log)
    assert found.agrees and found.policies == ["threshold performance"] * 3, found
    assert found.compared > 600 and len(found.logged_levels) > 1
