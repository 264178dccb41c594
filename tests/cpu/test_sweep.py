"""Several runs on several windows: measured once each, compared with what was simulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cpu.sim_world import CALIBRATION
from cpu.test_replay_compare import QUIET, WORKLOAD, comparison, fake

from morphserve.errors import ConfigError
from morphserve.tools.bench.cli import comparison_of
from morphserve.tools.bench.comparison import Comparison
from morphserve.tools.bench.report.tables import fold
from morphserve.tools.bench.simulated import sim_server
from morphserve.tools.bench.sweep import main
from morphserve.tools.bench.sweep.agreement import Agreement, compare
from morphserve.tools.bench.sweep.cli import build_parser
from morphserve.tools.bench.sweep.ranking import Order, Total, dominated, orders, totals, window_order
from morphserve.tools.bench.sweep.report import markdown
from morphserve.tools.bench.sweep.runs import measure_all
from morphserve.tools.workload import ReplayError

pytestmark = pytest.mark.cpu


def windows(tmp_path: Path, repeats: int) -> list[Comparison]:
    one = comparison(tmp_path, "stock", "static_w8", server=fake("morphserve"), repeats=repeats)
    return [replace(one, out=tmp_path / "out" / name, window=name) for name in ("calm", "burst")]


def test_servers_take_turns_and_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    """Guards: a server per run, a run that always follows the same one, an interrupted sweep that starts over."""
    rows = measure_all(windows(tmp_path, 2), QUIET)
    assert {key: len(found) for key, found in rows.items()} == {
        (window, run): 2 for window in ("calm", "burst") for run in ("stock", "static_w8")
    }
    files = sorted(tmp_path.glob("out/*/*/result.json"), key=lambda file: file.stat().st_mtime_ns)
    assert [str(file.parent.relative_to(tmp_path / "out")) for file in files] == [
        "calm/stock.1", "calm/static_w8.1", "burst/static_w8.1", "burst/stock.1",
        "calm/stock.2", "calm/static_w8.2", "burst/static_w8.2", "burst/stock.2",
    ]  # fmt: skip
    commands = {(file.parent.name.split(".")[0], json.loads(file.read_text())["setup"]["command"]) for file in files}
    assert len(commands) == 2, "a server was started more than once"
    before = {file: file.stat().st_mtime_ns for file in files}
    (tmp_path / "out/burst/stock.2/result.json").unlink()
    measure_all(windows(tmp_path, 2), QUIET)
    changed = {file for file in files if file.stat().st_mtime_ns != before[file]}
    assert changed == {tmp_path / "out/burst/stock.2/result.json"}
    (tmp_path / "out/burst/stock.2/result.json").write_text("{}")
    with pytest.raises(ReplayError, match="not the result of a run.*Delete it"):
        measure_all(windows(tmp_path, 2), QUIET)
    (tmp_path / "out/burst/stock.2/result.json").unlink()
    logs = {log: log.stat().st_mtime_ns for log in tmp_path.glob("out/servers/*/server.log")}
    slower = [replace(one, server=replace(one.server, cpu_bind="1")) for one in windows(tmp_path, 2)]
    with pytest.raises(ReplayError, match=r"calm/stock.1/result.json: measured with another config"):
        measure_all(slower, QUIET)
    drawn = []
    for one in windows(tmp_path, 2):
        client = replace(one.measurement.client, temperature=0.7)
        drawn.append(replace(one, measurement=replace(one.measurement, client=client)))
    with pytest.raises(ReplayError, match=r"calm/stock.1/result.json: measured with another config"):
        measure_all(drawn, QUIET)
    others = windows(tmp_path, 2)
    (tmp_path / "morph.yaml").write_text("kv: {max_num_blocks: 300}\n")
    with pytest.raises(ReplayError, match=r"static_w8.1/result.json: measured with another config"):
        measure_all(others, QUIET)
    assert len(logs) == 2 and logs == {log: log.stat().st_mtime_ns for log in logs}, "a server was started for nothing"


def row(rate: float, kl: float | None = None, preemptions: int = 10) -> dict[str, float | int | None]:
    return {
        "sent": 100, "violation_rate": rate, "expected_kl_per_token": kl, "output_tok_s": 200.0, "duration_s": 80.0,
        "preemptions": preemptions,
    }  # fmt: skip


def test_an_error_within_the_limit_holds_and_one_that_speed_explains_is_shown() -> None:
    """Guards: a simulation that is off counted as right, or a cliff counted as its fault."""
    exact = Agreement("w", "r", "preemptions", 100.0, 114.0, (110.0, 118.0))
    assert exact.holds and exact.error == pytest.approx(0.14)
    assert not replace(exact, simulated=116.0).holds and not replace(exact, simulated=116.0).explained
    cliff = Agreement("w", "r", "violation_rate", 0.10, 0.25, (0.05, 0.40))
    assert not cliff.holds and cliff.explained and cliff.error == pytest.approx(0.15)
    assert replace(exact, measured=0.0, simulated=0.0).holds
    assert not replace(exact, measured=0.0, simulated=1.0).holds


def test_several_seeds_are_one_simulation() -> None:
    """Guards: one draw of the scatter of steps taken for what is to be expected."""
    rows = [{**row(rate, None), "name": "slo", "preemptions": n} for rate, n in ((0.1, 3), (0.3, 9), (0.2, 4))]
    folded = fold(rows)
    assert {key: folded[key] for key in rows[0]} == {**rows[0], "violation_rate": 0.2, "preemptions": 4}
    assert folded["spread"]["preemptions"] == [3, 9] and folded["repeats"] == 3
    assert fold([row(0.1, 0.5), row(0.1)])["known"] == {"expected_kl_per_token": 1}


def test_runs_are_ranked_by_violations_then_by_cost_over_all_windows() -> None:
    """Guards: windows weighed alike whatever they sent, stock without a cost, a rank decided by noise."""
    measured = {
        ("a", "stock"): [row(0.4)], ("b", "stock"): [{**row(0.0), "sent": 300}],
        ("a", "slo"): [row(0.012, 0.02)], ("b", "slo"): [row(0.0, 0.04)],
        ("a", "w8"): [row(0.008, 0.029)], ("b", "w8"): [row(0.0, 0.029)],
    }  # fmt: skip
    ranked = totals(measured)
    assert [(t.run, round(t.violation_rate, 4)) for t in ranked] == [("w8", 0.004), ("slo", 0.006), ("stock", 0.1)]
    assert ranked[2].expected_kl_per_token == 0.0 and ranked[1].expected_kl_per_token == pytest.approx(0.03)
    simulated = {key: dict.fromkeys((0.9, 1.0, 1.1), rows[0]) for key, rows in measured.items()}
    text = markdown(measured, simulated, "title")
    assert "3 of 3 pairs in the same order, 0 the other way round" in text and "**" not in text.split("Each cell")[0]
    simulated["a", "w8"] = dict.fromkeys((0.9, 1.0, 1.1), row(0.5, 0.029))
    text = markdown(measured, simulated, "title")
    assert "1 of 3 pairs in the same order, 1 the other way round" in text
    assert "- w8 is not to be told from slo; simulated behind it." in text
    assert "- w8 is before stock; simulated behind it." in text
    assert "**1%, 50% [50%, 50%], +49 points**" in text
    assert {a.figure for a in compare(measured, simulated) if not a.holds} == {"violation_rate"}


def test_runs_in_which_nothing_came_out_have_no_cost() -> None:
    """Guards: a division by zero after hours of measuring; a dead server's errors that nobody is told of."""
    dead = {**row(1.0, 0.02), "output_tok_s": 0.0, "statuses": {"ok": 1, "error": 99}}
    rows = {("a", "slo"): [dead], ("a", "static_w8"): [row(0.0, 0.03)]}
    assert totals(rows)[-1].expected_kl_per_token is None
    text = markdown(rows, {}, "title")
    assert "- slo: not answered in full, in all repeats together: 99 error." in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sim-noise", "0.1"), "--sim-noise is of a simulation: add --step-times"),
        (("--step-times", "times.json", "--serve-arg=--max-num-batched-tokens=512"), "give it as an option of its own"),
        (("--sim-speed", "0.7"), "--sim-speed is of a simulation without servers"),
        (("--simulate",), "--simulate needs --step-times FILE"),
    ],
)
def test_what_only_one_side_would_get_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    """Guards: two different servers compared as measured and simulated."""
    code = main(["--window", "a.jsonl", "--out", str(tmp_path / "o"), "--model", "m", *arguments])
    assert code == 1 and words in capsys.readouterr().err


def test_servers_get_what_is_simulated(tmp_path: Path) -> None:
    """Guards: a simulated server with another batch than the real one."""
    words = ["--window", "w", "--step-times", "f", "--max-num-batched-tokens", "512", "--async-scheduling"]
    args = build_parser("sweep").parse_args([*words, "--max-num-queued-tokens", "0"])
    asked = comparison_of(args, "w", WORKLOAD, with_text=False)
    given = ["--max-num-batched-tokens", "512", "--async-scheduling", "--max-num-queued-tokens", "0"]
    assert asked.server.arguments(0, ())[-5:] == given
    server = sim_server(asked.server, asked.measurement, 0.0)
    assert (server.max_num_batched_tokens, server.max_num_queued_tokens, server.async_scheduling) == (512, 0, True)
    many = replace(asked.server, max_num_batched_tokens=2048, max_num_seqs=4096)  # vLLM's own limit may be above that
    assert "--max-num-batched-tokens" not in many.arguments(0, ())
    with pytest.raises(ConfigError, match="max_num_batched_tokens 2048 is below max_num_seqs 4096"):
        sim_server(many, asked.measurement, 0.0)


def test_two_runs_are_told_apart_by_what_no_repeat_contradicts() -> None:
    """Guards: an order that is noise, and one that is not and gets lost in it."""

    def repeats(*figures: tuple[float, float]) -> list[list[Total]]:
        return [[Total("a", rate, 0.02), Total("b", other, 0.03)] for rate, other in figures]

    def verdict(*figures: tuple[float, float]) -> int:
        return orders(repeats(*figures), repeats((0.0, 0.0)))[0].measured

    assert verdict((0.10, 0.20), (0.105, 0.10), (0.1, 0.3)) == 1
    assert verdict((0.20, 0.10), (0.30, 0.20)) == -1
    assert verdict((0.10, 0.20), (0.30, 0.10)) == 1, "repeats that contradict each other leave it to the cost"
    assert verdict((0.205, 0.2), (0.205, 0.2)) == 1
    even = [[Total("a", 0.1, 0.0300), Total("b", 0.1, 0.0305)]]
    assert orders(even, even) == [Order(("a", "b"), 0, 0)]
    unknown = [[Total("a", 0.1, None), Total("b", 0.1, 0.1)]]
    assert orders(unknown, unknown) == [Order(("a", "b"), 0, 0)]


def test_windows_are_ranked_one_by_one() -> None:
    """Guards: one hard window that decides the order of all, and an order by a repeat that was an outlier."""
    measured = {
        ("calm", "slo"): [row(0.0, 0.02)] * 3, ("calm", "w8"): [row(0.004, 0.01)] * 3,
        ("calm", "stock"): [row(0.9)] * 3, ("hard", "w8"): [row(0.08, 0.03)] * 3,
        ("hard", "slo"): [row(0.05, 0.1), row(0.9, 0.1), row(0.06, 0.1)],
        ("hard", "stock"): [row(0.95)] * 3,
    }  # fmt: skip
    assert window_order(measured, "calm") == ["w8", "slo", "stock"]
    assert window_order(measured, "hard") == ["slo", "w8", "stock"]
    simulated = {key: dict.fromkeys((0.9, 1.0, 1.1), rows[0]) for key, rows in measured.items()}
    assert "the same order on 2 of 2." in markdown(measured, simulated, "title")
    simulated["hard", "w8"] = dict.fromkeys((0.9, 1.0, 1.1), row(0.0, 0.03))
    text = markdown(measured, simulated, "title")
    assert "the same order on 1 of 2." in text
    assert "- hard: measured slo, w8, stock; simulated w8, slo, stock." in text
    measured["calm", "slo"] = [row(0.0, None)]
    assert window_order(measured, "calm") == ["w8", "slo", "stock"], "an unknown cost is not the least"


def test_a_static_format_that_does_as_well_for_less_is_named() -> None:
    """Guards: a policy praised where the model quantized for good does the same, or a static run blamed."""
    rows = {
        ("calm", "slo"): [row(0.0, 0.01)], ("calm", "static_w8"): [row(0.0, 0.03)], ("calm", "stock"): [row(0.0)],
        ("hard", "slo"): [row(0.2, 0.1), row(0.1, 0.1)], ("hard", "static_w8"): [row(0.1, 0.03), row(0.2, 0.03)],
        ("hard", "static_w4"): [row(0.0, 0.3), row(0.0, 0.3)], ("hard", "stock"): [row(0.9), row(0.9)],
    }  # fmt: skip
    assert dominated(rows) == [("hard", "static_w8", "slo")]
    assert "- On hard static_w8 has no more violations than slo, at less KL" in markdown(rows, {}, "title")
    rows["hard", "static_w8"] = [row(0.25, 0.03), row(0.2, 0.03)]
    assert dominated(rows) == []


def test_a_bad_config_is_refused_before_any_server_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an hour of measuring that ends in a message."""
    CALIBRATION.save(tmp_path / "times.json")
    (tmp_path / "bad.yaml").write_text("policy: {kind: static, level: w2}\n")
    code = main(
        ["--window", "a.jsonl:thinn=2", "--out", str(tmp_path / "out"), "--model", "nowhere"],
    )  # fmt: skip
    assert code == 1 and "unknown option 'thinn'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_many_windows_are_simulated_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a model, prompts or servers asked for though only lengths are read; repeats that are all one."""
    CALIBRATION.save(tmp_path / "times.json")
    root = Path(__file__).parents[2]
    windows = [f"--window=synthetic:{seed},duration=20" for seed in (1, 2)]
    options = ["--config", str(root / "policies" / "yaml" / "demo.yaml"), "--compare", "stock,morphserve", "--quiet"]
    options += ["--simulate", "--step-times", str(tmp_path / "times.json"), "--out", str(tmp_path / "out")]
    options += [f"{window}:input_clip=8,120:output_clip=4,384" for window in windows]
    assert main([*options, "--repeats", "2", "--sim-noise", "0.1"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(document) == ["report", "runs", "dominated", "agreement"] and document["agreement"] == []
    assert [run["name"] for run in document["runs"]].count("morphserve") == 1
    text = Path(document["report"]).read_text()
    assert text.startswith("# Simulated at 1 times") and "Medians of 2 seeds" in text
    cells = next(line for line in text.splitlines() if line.startswith("| stock")).split("|")
    low, high = cells[6].split("[")[1].rstrip("] ").split(", ")
    assert low != high, "two seeds, two durations"
