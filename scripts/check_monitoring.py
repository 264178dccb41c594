"""Do the board's queries and the alerts work on a real server? Prometheus scrapes one that morphs and meets trouble.

A server of few KV blocks serves a burst, is ordered to a level, refuses an edited policy, finds its cached layers
changed, can write no file for a while, is told wrong step times, and hangs. Each alert that this can bring about must
fire and clear; each query of the board must have had data. scripts/fetch_prometheus.py brings Prometheus. A copy of the
rules waits seconds where the shipped ones wait minutes (`_SHORT`). Five minutes on two cores.

Columns: alert, seconds until it fired, and until it was silent again, all being well. Then of the board: series, query.
Exit status 1 if an alert did not fire or clear, or a query had no data. Last stdout line: one JSON document.

    python scripts/check_monitoring.py MODEL --out reports/monitoring
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from fetch_prometheus import find_tool
from monitored_server import TROUBLE, Stage

from morphserve.errors import MorphServeError
from morphserve.shipped import MONITORING
from morphserve.tools.bench import ServerOptions, serve
from morphserve.tools.command import command_parser, run_command, say
from morphserve.tools.machine import describe_machine
from morphserve.tools.tables import markdown_table

_SHORT = {"30m": "8s", "15m": "20s"}  # windows and offsets of the rules, as the copy has them
_FOR = "2s"
_WITHIN_S = 90.0  # an engine counts as silent after 30 s
_EVERY_S = 0.5
_RATE_WINDOW = "30s"
# What no trouble from outside brings about; tests/cpu/test_monitoring.py fires and clears them on made-up series.
NOT_MADE = {
    "MorphServeFailed": "only an error in MorphServe's own code, which this does not plant",
    "MorphServeBlocksNotBacked": "must never be",
    "MorphServeRequestsRefused": "only policies that refuse; tests/engine/test_server.py has one that does",
}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, help="directory for logs and settings; default: a temporary one")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}

    def job() -> dict[str, Any]:
        found.update(_check(args))
        return found

    return run_command("check_monitoring.py", job, "server and Prometheus are stopped") or int(bool(found["failed"]))


def _check(args: argparse.Namespace) -> dict[str, Any]:
    binary = find_tool("prometheus")
    if binary is None:
        raise MorphServeError("no prometheus here. Bring it with: python scripts/fetch_prometheus.py")
    directory = (args.out or Path(tempfile.mkdtemp(prefix="morphserve-monitoring-"))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    say(f"logs: {directory}")
    stage = Stage("", 0, directory)
    stage.prepare()
    server = ServerOptions(model=args.model, enforce_eager=True, num_blocks=49, max_model_len=512, max_num_seqs=24)
    own = ("--plugin", "morphserve", "--morphserve-config", str(stage.config))
    with serve(server, directory / "server.log", own) as running:
        stage.url, stage.pid = running.url, int(running.pid or 0)
        with _prometheus(stage, binary):
            begin_s = time.time()
            stage.burst()
            alerts = _alerts(stage)
            return _judged(alerts, _board(stage, begin_s), _rules_of_others(stage, begin_s))


@contextlib.contextmanager
def _prometheus(stage: Stage, binary: str) -> Iterator[None]:
    """Start Prometheus on the server's metrics, with the rules that wait seconds."""
    where, port = stage.directory, _free_port()
    text = re.sub(r"\b\d+m\b", lambda found: _SHORT.get(found[0], _FOR), MONITORING[0].read_text())
    rules = yaml.safe_load(text)
    for rule in rules["groups"][0]["rules"]:
        if "for" in rule:
            rule["for"] = _FOR
    (where / "alerts.yaml").write_text(yaml.safe_dump(rules))
    target = {"job_name": "vllm", "static_configs": [{"targets": [stage.url.removeprefix("http://")]}]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [target],
    }
    (where / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [binary, f"--config.file={where}/prometheus.yml", f"--storage.tsdb.path={where}/data"]
    with (where / "prometheus.log").open("w") as log:
        listens = f"--web.listen-address=127.0.0.1:{port}"
        process = subprocess.Popen([*command, listens], stdout=log, stderr=subprocess.STDOUT)
    try:
        stage.prometheus = f"http://127.0.0.1:{port}"
        if _wait(lambda: _has_target(stage)) is None:
            raise MorphServeError(f"Prometheus does not scrape the server: {where}/prometheus.log")
        yield
    finally:
        process.terminate()
        process.wait(20)


def _has_target(stage: Stage) -> bool:
    try:
        return bool(stage.query("query", query="up == 1")["result"])
    except OSError:
        return False


def _wait(fits: Callable[[], bool]) -> float | None:
    """Return the seconds until it fits; None = it does not in time."""
    begin = time.monotonic()
    while time.monotonic() - begin < _WITHIN_S:
        if fits():
            return time.monotonic() - begin
        time.sleep(_EVERY_S)
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _alerts(stage: Stage) -> list[dict[str, Any]]:
    """Bring each alert about, and see it fire and clear."""
    rows = []
    for trouble, names in TROUBLE:
        for name in names:  # it may still fire for what was before
            _wait(partial(stage.is_silent, name))
        begin = time.monotonic()
        with trouble(stage):
            fired = {name: _since(begin, _wait(partial(stage.is_firing, name))) for name in names}
        begin = time.monotonic()
        for name in names:
            cleared = _since(begin, _wait(partial(stage.is_silent, name)))
            rows.append({"alert": name, "how": _first_line(trouble), "fired_s": fired[name], "cleared_s": cleared})
            say(f"{name}  {fired[name]}  {cleared}")
    return rows


def _since(begin: float, waited: float | None) -> float | None:
    return None if waited is None else round(time.monotonic() - begin, 1)


def _first_line(trouble: Callable[..., Any]) -> str:
    return (trouble.__doc__ or "").splitlines()[0].rstrip(".")


def _board(stage: Stage, begin_s: float) -> list[dict[str, Any]]:
    """Return each query of the board, with how many series it has had; of what one can choose, how many values."""
    board, rows = json.loads(MONITORING[1].read_text()), []
    for choice in board["templating"]["list"]:
        if found := re.fullmatch(r"label_values\((.+), (\w+)\)", choice["query"]):
            values = stage.query(f"label/{found[2]}/values", **{"match[]": found[1]})
            rows.append({"panel": f"choice of {choice['name']}", "query": choice["query"], "series": len(values)})
    for panel in board["panels"]:
        for target in panel["targets"]:
            expr = target["expr"].replace("$instance", ".*").replace("$__rate_interval", _RATE_WINDOW)
            rows.append({"panel": panel["title"], "query": target["expr"], "series": stage.series(expr, begin_s)})
            say(f"{rows[-1]['series']}  {panel['title']}  {target['expr']}")
    return rows


def _rules_of_others(stage: Stage, begin_s: float) -> list[dict[str, Any]]:
    """Return the alerts that are not brought about, with the series of the metrics that they look at."""
    rules = yaml.safe_load(MONITORING[0].read_text())["groups"][0]["rules"]
    rows = []
    for rule in rules:
        if rule["alert"] in NOT_MADE:
            selectors = sorted(set(re.findall(r"\w+:\w+(?:\{[^}]*\})?", rule["expr"])))
            series = {selector: stage.series(selector, begin_s) for selector in selectors}
            rows.append({"alert": rule["alert"], "why": NOT_MADE[rule["alert"]], "series": series})
    return rows


def _judged(alerts: list[dict[str, Any]], board: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [row["alert"] for row in alerts if row["fired_s"] is None or row["cleared_s"] is None]
    failed += [row["query"] for row in board if not row["series"]]
    failed += [row["alert"] for row in others if not all(row["series"].values())]
    head = ("alert", "brought about", "fired after (s)", "silent again after (s)")
    rows = [(r["alert"], r["how"], str(r["fired_s"]), str(r["cleared_s"])) for r in alerts]
    say("\n".join(markdown_table(head, rows)))
    queries = [(r["panel"], f"`{r['query']}`".replace("|", "\\|"), str(r["series"])) for r in board]
    say("\n".join(markdown_table(("panel", "query", "series"), queries)))
    machine = describe_machine()
    return {"machine": machine, "alerts": alerts, "not_made": others, "board": board, "failed": failed}


if __name__ == "__main__":
    sys.exit(main())
