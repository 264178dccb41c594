"""Alert rules and the board that travel in the wheel, as Prometheus' own tool reads and runs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import fetch_prometheus
import pytest
import yaml
from check_monitoring import NOT_MADE, TROUBLE, _judged
from fetch_prometheus import find_tool

from morphserve.commands import main
from morphserve.shipped import MONITORING

pytestmark = pytest.mark.cpu

ALERTS, BOARD = MONITORING
PROMTOOL = find_tool("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here: python3 scripts/fetch_prometheus.py")
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]

# alert |-> series, a value a minute; when it must be silent, when it must fire, when it must be silent again (minutes)
SCENARIOS: dict[str, tuple[dict[str, str], tuple[int, int, int]]] = {
    "MorphServeFailed": ({'failed{engine="0"}': "0x4 1x4 0x9"}, (3, 6, 12)),
    "MorphServeEngineSilent": ({'status_age_seconds{engine="0"}': "0x4 60+60x5 1x9"}, (5, 8, 15)),
    "MorphServeBlocksNotBacked": (
        {'kv_blocks{engine="0",state="published"}': "49x20", 'kv_blocks{engine="0",state="backed"}': "49x4 48x5 49x9"},
        (4, 8, 13),
    ),
    "MorphServeTransitionsAborted": (
        {'transitions_total{engine="0",direction="restore",outcome="aborted"}': "0x4 1x40"}, (3, 6, 30)),
    "MorphServeErrors": ({'errors_total{engine="0",where="prepare"}': "2x20 3x40"}, (19, 25, 50)),
    "MorphServeStaysDegraded": (
        {'level{engine="0"}': "0x5 4x70 0x20", 'policy{engine="0",kind="static"}': "0x95",
         'order{engine="0",kind="pin"}': "0x95", 'order{engine="0",kind="pause"}': "1x95"}, (62, 70, 80)),
    "MorphServePolicyRefused": ({'policy_reloads_total{engine="0",outcome="refused"}': "0x5 1x40"}, (4, 8, 30)),
    "MorphServePredictionsDistrusted": ({'predictions{engine="0",state="distrusted"}': "0x5 1x30 0x9"}, (15, 30, 40)),
    "MorphServeRequestsLate": (
        {'requests_late_total{engine="0",limit="ttft"}': "0x5 1+1x40 41x40",
         'requests_late_total{engine="0",limit="both"}': "0x5 1+1x40 41x40",
         'requests_judged_total{engine="0"}': "0+10x100"}, (15, 40, 70)),
    "MorphServeRequestsRefused": ({'requests_refused_total{reason="floor"}': "0x5 1+1x40 41x40"}, (15, 40, 65)),
    "MorphServeDecisionsDropped": ({'decisions_dropped_total{engine="0"}': "0x5 0+9x5 54x40"}, (4, 9, 40)),
}  # fmt: skip

_LOW = {'level{engine="0"}': "4x120"}
# alert |-> series in which it must never fire, one set after the other
SILENT: tuple[tuple[str, dict[str, str]], ...] = (
    # scraping had a gap; the server was started anew
    ("MorphServeTransitionsAborted", {'transitions_total{engine="0",outcome="aborted"}': "1x20 _x30 1x30 0x40"}),
    ("MorphServeErrors", {'errors_total{engine="0",where="prepare"}': "2x20 _x30 2x30 0x40"}),
    # somebody has asked for the level
    ("MorphServeStaysDegraded", {**_LOW, 'policy{engine="0",kind="static"}': "1x120"}),
    ("MorphServeStaysDegraded", {**_LOW, 'order{engine="0",kind="pin"}': "1x120"}),
    ("MorphServeRequestsRefused", {'requests_refused_total{reason="drain"}': "0+1x120"}),
    # few, and none
    ("MorphServeRequestsLate", {'requests_late_total{engine="0",limit="tpot"}': "0+1x120",
                                'requests_judged_total{engine="0"}': "0+20x120"}),
    ("MorphServeRequestsLate", {'requests_late_total{engine="0",limit="tpot"}': "9x120",
                                'requests_judged_total{engine="0"}': "50x120"}),
)


def test_each_alert_is_met_by_a_real_server_or_says_why_not() -> None:
    """Guards: an alert that the check on a real server has never heard of."""
    made = [name for _, names in TROUBLE for name in names]
    assert sorted([*made, *NOT_MADE]) == sorted(SCENARIOS) and all(NOT_MADE.values())


def test_the_check_fails_for_what_it_has_not_seen() -> None:
    """Guards: a check on a real server that is content with a silent alert, one that stays, or an empty panel."""
    fine = {"alert": "A", "how": "so", "fired_s": 1.0, "cleared_s": 2.0}
    shown, metric = {"panel": "P", "query": "q", "series": 1}, {"alert": "N", "why": "", "series": {"m": 1}}
    assert _judged([fine], [shown], [metric])["failed"] == []
    for alerts, board, others, failed in (
        ([{**fine, "fired_s": None}], [shown], [metric], "A"),
        ([{**fine, "cleared_s": None}], [shown], [metric], "A"),
        ([fine], [{**shown, "series": 0}], [metric], "q"),
        ([fine], [shown], [{**metric, "series": {"m": 1, "k": 0}}], "N"),
    ):
        assert _judged(alerts, board, others)["failed"] == [failed]


def promtool(*words: str | Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_rules(file: Path, series: dict[str, str], expected: dict[int, tuple[str, float | None]]) -> None:
    """Run the alerts on series; `expected`: minute |-> query, its only value, None = none."""
    checks = []
    for minute, (expr, value) in expected.items():
        samples = [] if value is None else [{"labels": "{}", "value": value}]
        checks.append({"expr": expr, "eval_time": f"{minute}m", "exp_samples": samples})
    inputs = [{"series": f"morphserve:{name}", "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": checks}
    document = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    promtool("test", "rules", file)


def test_each_alert_has_its_scenario() -> None:
    """Guards: an alert that nobody has seen fire; one without a word on what to do."""
    assert {rule["alert"] for rule in RULES} == set(SCENARIOS)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


@needs_promtool
@pytest.mark.parametrize("alert", SCENARIOS)
def test_an_alert_fires_and_clears(alert: str, tmp_path: Path) -> None:
    """Guards: an alert that misses its case, and one that stays."""
    series, (before, during, after) = SCENARIOS[alert]
    expr = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    run_rules(tmp_path / "test.yaml", series, {before: (expr, None), during: (expr, 1), after: (expr, None)})


@needs_promtool
@pytest.mark.parametrize(("alert", "series"), SILENT)
def test_an_alert_is_silent(alert: str, series: dict[str, str], tmp_path: Path) -> None:
    """Guards: an alert on what was long ago, since nobody looked meanwhile; one on what somebody has asked for."""
    expr = f'count(count_over_time(ALERTS{{alertname="{alert}",alertstate="firing"}}[3h]))'
    run_rules(tmp_path / "test.yaml", series, {120: (expr, None)})


@needs_promtool
def test_prometheus_reads_rules_and_queries(tmp_path: Path) -> None:
    """Guards: a rule file that Prometheus does not start with, a panel that shows an error."""
    promtool("check", "rules", ALERTS)
    exprs = [target["expr"] for panel in json.loads(BOARD.read_text())["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"panel:{number}", "expr": expr.replace("$instance", ".*").replace("$__rate_interval", "1m")}
        for number, expr in enumerate(exprs)
    ]
    assert not [rule for rule in rules if "$" in rule["expr"]]
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", file)


def test_the_files_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: files in the wheel that nobody can reach, or an edited one that is overwritten."""
    assert main(["init", "--monitoring", str(tmp_path)]) == 0
    assert "rule_files of prometheus.yml" in capsys.readouterr().out
    for source in MONITORING:
        assert (tmp_path / source.name).read_bytes() == source.read_bytes()
    assert main(["init", "--monitoring", str(tmp_path)]) == 1
    assert "alerts.yaml exists and is left as it is" in capsys.readouterr().err


APT = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
  *update*) touch "$LOG.lists" ;;
  *download*) [ -e "$LOG.lists" ] || { echo "E: Unable to locate package prometheus" >&2; exit 100; }
              touch prometheus_9.deb ;;
esac
"""
DPKG = """#!/bin/sh
mkdir -p "$3/usr/bin"
for each in prometheus promtool; do echo '#!/bin/sh' > "$3/usr/bin/$each"; chmod +x "$3/usr/bin/$each"; done
"""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a shell and an empty cache; what is in the directory is on its PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "touch", "mkdir", "chmod"):
        (programs / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("LOG", str(tmp_path / "apt.log"))
    monkeypatch.setenv("MORPHSERVE_CACHE", str(tmp_path / "cache"))
    return programs


def test_promtool_is_brought_where_apt_has_no_lists(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: CI on a fresh machine, where apt knows of no package before it has looked, skips the rules' tests for
    ever; an update of the machine's own lists, which needs root."""
    for name, text in (("apt-get", APT), ("dpkg-deb", DPKG)):
        (bare / name).write_text(text)
        (bare / name).chmod(0o755)
    assert find_tool("promtool") is None and fetch_prometheus.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert [(name, Path(path).name) for name, path in found.items()] == [(n, n) for n in ("prometheus", "promtool")]
    assert subprocess.run([found["promtool"]], check=False).returncode == 0
    first, update, again = (bare.parent / "apt.log").read_text().splitlines()
    assert first == "download prometheus" and "Dir::State::Lists=" in update and "Dir::State::Lists=" in again
    assert fetch_prometheus.main() == 0, "a second time it is there"
    assert len((bare.parent / "apt.log").read_text().splitlines()) == 3
    assert [path.name for path in (bare.parent / "cache").iterdir()] == ["prometheus"]


def test_without_a_package_the_reason_is_one_line(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a gate that fails, or says nothing, on a machine that has no apt or reaches no package."""
    assert fetch_prometheus.main() == 1
    assert capsys.readouterr().err.splitlines() == [
        "fetch_prometheus.py: no promtool: no apt-get here; put Prometheus 2.42 or later on PATH"
    ]
    for name in ("apt-get", "dpkg-deb"):
        (bare / name).write_text("#!/bin/sh\necho 'E: no network' >&2; exit 100\n")
        (bare / name).chmod(0o755)
    assert fetch_prometheus.main() == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("E: no network") and find_tool("promtool") is None
