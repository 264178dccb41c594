"""Servers started and stopped, comparisons run, and what they leave behind."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import os
import re
import signal
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu import replay_fakes
from cpu.replay_fakes import CORPUS, encode

from morphserve.config import parse_config
from morphserve.errors import ConfigError
from morphserve.tools.bench import main, paired
from morphserve.tools.bench.comparison import Comparison, derived_config
from morphserve.tools.bench.load.client import ClientOptions
from morphserve.tools.bench.load.measure import Measurement, measure
from morphserve.tools.bench.load.server import ServerOptions, serve
from morphserve.tools.bench.paired import ClosedLoop, PairedResult, compare_idle
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.report.report import write_report
from morphserve.tools.bench.report.results import ROW_KEYS, RunResult
from morphserve.tools.bench.report.summary import summarize
from morphserve.tools.bench.runner import run_all
from morphserve.tools.bench.servers import StartedServers
from morphserve.tools.command import run_command
from morphserve.tools.workload import ReplayError, Slo
from morphserve.tools.workload.formats import TraceRequest
from morphserve.tools.workload.outcome import Outcome, Replayed, Snapshot
from morphserve.tools.workload.prompts import PromptMaker
from morphserve.tools.workload.workload import Workload
from policies import SloConfig

FAKE = ServerOptions(model="tiny", command=(sys.executable, replay_fakes.__file__), start_timeout_s=60, extra_args=())
WORKLOAD = Workload("tiny", tuple(TraceRequest(i * 0.02, 5, 4) for i in range(6)), 512)
QUIET = ConsoleProgress(enabled=False)
STARTED = StartedServers(QUIET)


def fake(what: str) -> ServerOptions:
    return replace(FAKE, extra_args=("--fake", what))


def comparison(tmp_path: Path, *names: str, server: ServerOptions = FAKE, repeats: int = 1) -> Comparison:
    config = tmp_path / "morph.yaml"
    config.write_text("kv: {max_num_blocks: 400}\ndecision_log: log.jsonl\n", encoding="utf-8")
    return Comparison(
        names=names,
        server=server,
        measurement=Measurement(
            workload=WORKLOAD,
            prompts=PromptMaker(CORPUS, encode).make(WORKLOAD),
            slo=Slo(60.0, 60.0),
            client=ClientOptions(url="", model="demo", cutoff_s=60),
            poll_s=0.05,
        ),
        out=tmp_path / "out",
        config=config,
        repeats=repeats,
    )


def alive(pid: int) -> bool:
    """A process that runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_server_and_its_children_are_gone_after_an_error(tmp_path: Path) -> None:
    """Guards the machine: an engine process that stays would spoil every later run."""
    marker = tmp_path / "child"
    with (
        pytest.raises(KeyboardInterrupt),
        serve(fake(str(marker)), tmp_path / "server.log") as server,
    ):
        child = int(Path(f"{marker}.pid").read_text(encoding="utf-8"))
        assert alive(server.pid) and alive(child)
        assert os.getpgid(child) == server.pid != os.getpgid(0)
        raise KeyboardInterrupt
    assert not alive(server.pid) and not alive(child)


def test_server_that_never_gets_healthy_is_given_up(tmp_path: Path) -> None:
    """Guards against waiting for ever; the process must be gone as well."""
    options = replace(fake("unhealthy"), start_timeout_s=0.0)
    with pytest.raises(ReplayError, match="--start-timeout"), serve(options, tmp_path / "server.log"):
        pass


def test_missing_vllm_is_explained(tmp_path: Path) -> None:
    """Guards against a bare FileNotFoundError."""
    options = replace(FAKE, command=("/no/such/vllm", "serve"))
    with pytest.raises(ReplayError, match="/no/such/vllm"), serve(options, tmp_path / "server.log"):
        pass


def test_runs_differ_in_the_plugin_alone(tmp_path: Path) -> None:
    """Guards a fair comparison: same flags, same memory, same mode for every server."""
    commands = {}
    for result in run_all(comparison(tmp_path, "stock", "morphserve", "static_w8", "static_w4"), STARTED, QUIET):
        commands[result.name] = re.sub(r"--port \d+", "", result.setup["command"])
    stock = commands.pop("stock")
    assert "morphserve" not in stock
    for name, command in commands.items():
        config = (tmp_path / "out" / name / "config.yaml").resolve()
        assert command == f"{stock} --plugin morphserve --morphserve-config {config}"


def test_static_baselines_change_only_the_policy(tmp_path: Path) -> None:
    """Guards the baselines: a static run with another ladder or block limit proves nothing."""
    base = comparison(tmp_path, "morphserve").config
    assert base is not None
    morph, w8, w4 = (derived_config(base, n, tmp_path) for n in ("morphserve", "static_w8", "static_w4"))
    assert morph == {"kv": {"max_num_blocks": 400}, "decision_log": str(tmp_path / "decisions.jsonl")}
    base.write_text(base.read_text().replace("log.jsonl", "log.jsonl.gz"), encoding="utf-8")
    assert derived_config(base, "morphserve", tmp_path)["decision_log"] == str(tmp_path / "decisions.jsonl.gz")
    assert w8 == morph | {"policy": {"kind": "static", "level": "w8"}}
    assert w4 == morph | {"policy": {"kind": "static", "level": "w4"}}


def test_comparison_measures_every_run(tmp_path: Path) -> None:
    """Guards the chain: server, warm-up, replay, metrics, status and files, for stock and MorphServe."""
    results = run_all(comparison(tmp_path, "stock", "morphserve"), STARTED, QUIET)
    summary = summarize(WORKLOAD, "tiny.jsonl", Slo(60.0, 60.0), results)
    stock, morph = summary.document("r")["runs"]
    assert list(stock) == list(morph) == list(ROW_KEYS)
    assert stock["sent"] == morph["sent"] == 6
    assert stock["violation_rate"] == morph["violation_rate"] == 0.0
    assert stock["preemptions"] == 6  # of the measured requests, not of the warm-up
    absent = ("tokens_by_level", "expected_kl_per_token", "transitions", "level_zero_after_s", "pause_max_ms")
    assert all(stock[key] is None for key in absent)
    assert morph["tokens_by_level"] == {"0": 24, "1": 24}
    assert morph["expected_kl_per_token"] == pytest.approx(0.01)
    assert (morph["transitions"], morph["pause_max_ms"]) == (6, 7.5)
    with (tmp_path / "out" / "stock" / "requests.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["good"] for row in rows] == ["1"] * 6


def test_repeats_are_interleaved_and_folded(tmp_path: Path) -> None:
    """Guards repeats: run in blocks, a drift of the machine would look like a difference of the servers."""
    results = run_all(comparison(tmp_path, "stock", "morphserve", repeats=2), STARTED, QUIET)
    assert [(r.name, r.repeat) for r in results] == [
        ("stock", 1), ("morphserve", 1), ("stock", 2), ("morphserve", 2),
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "morphserve.1", "morphserve.2", "stock.1", "stock.2",
    ]  # fmt: skip
    stock = summarize(WORKLOAD, "w", Slo(60.0, 60.0), results).rows[0]
    both = [r.figures()["ttft_p50_s"] for r in results if r.name == "stock"]
    assert stock["repeats"] == 2
    assert stock["spread"]["ttft_p50_s"] == [min(both), max(both)]
    assert stock["ttft_p50_s"] == pytest.approx(sum(both) / 2)


def test_no_config_is_what_a_server_without_one_does(tmp_path: Path) -> None:
    """Guards: a user who must write a file to see what he gets without one."""
    asked = replace(comparison(tmp_path, "stock", "morphserve"), config=None)
    asked.check()
    derived, default = (parse_config(each, "here") for each in (asked.derived("morphserve", tmp_path), {}))
    assert derived.model_dump(exclude={"policy"}) == default.model_dump(exclude={"policy"})
    assert derived.policy.kind == default.policy.kind


def test_a_policy_of_promises_keeps_what_requests_are_judged_by(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: servers that pay for 2 s and 150 ms where twelve seconds are asked, compared with others that do not."""
    some = comparison(tmp_path, "stock", "morphserve")
    asked = replace(some, config=None, measurement=replace(some.measurement, slo=Slo(12.0, 0.75)))
    asked.check()
    policy = parse_config(asked.derived("morphserve", tmp_path), "here").policy
    assert isinstance(policy, SloConfig) and (policy.ttft_s, policy.tpot_s) == (12.0, 0.75) and not caplog.records
    config = tmp_path / "own.yaml"
    config.write_text("policy: {kind: slo, ttft_s: 1.0}\n")
    replace(asked, config=config).check()
    assert [f"{config} promises ttft_s: 1, and requests are judged by 12."] == [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize(
    ("names", "config", "error"),
    [
        (("stock", "fp8"), "kv: {}", ReplayError),
        (("stock", "stock"), "kv: {}", ReplayError),
        ((), "kv: {}", ReplayError),
        (("stock", "morphserve"), "polcy: {}", ConfigError),
        (("stock", "static_w9"), "kv: {}", ReplayError),
        (("stock", "morphserve"), "policy: {kind: slo}\nstep_times: /none.json", ReplayError),
    ],
)
def test_impossible_comparisons_are_refused_first(
    tmp_path: Path, names: tuple[str, ...], config: str, error: type[Exception]
) -> None:
    """Guards the user's minutes: what fails at the second server must be refused before the first."""
    asked = comparison(tmp_path, *names)
    assert asked.config is not None
    asked.config.write_text(config, encoding="utf-8")
    with pytest.raises(error):
        asked.check()
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_checked_before_its_first_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: what `Comparison.check` refuses, found out at the second server."""
    arguments = ["--workload", str(small_workload(tmp_path)), "--model", tokenizer(tmp_path), "--out", f"{tmp_path}/o"]
    assert main([*arguments, "--corpus", small_corpus(tmp_path), "--compare", "stock,fp8", "--quiet"]) == 1
    assert "--compare stock,fp8: choose from stock, morphserve" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_config_may_lie_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: `--config=~/mine.yaml`, which no shell expands, read once and then not found."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("kv: {max_num_blocks: 300}\n")
    asked = replace(comparison(tmp_path, "morphserve"), config=Path("~/mine.yaml"))
    asked.check()
    assert derived_config(Path("~/mine.yaml"), "morphserve", tmp_path) == {"kv": {"max_num_blocks": 300}}


def test_a_server_that_dies_in_a_run_leaves_no_result(tmp_path: Path) -> None:
    """Guards: the errors of a dead server kept as what a policy does to its users."""
    with serve(FAKE, tmp_path / "server.log") as server:
        asked = comparison(tmp_path, "stock").measurement
        asked = replace(asked, client=replace(asked.client, url=server.url))

        def kill(outcome: Outcome) -> None:
            if alive(server.pid):
                os.killpg(server.pid, signal.SIGKILL)

        with pytest.raises(ReplayError, match=f"{server.url} does not answer any more.*nothing is kept"):
            asyncio.run(measure(asked, kill))


def test_repeats_of_which_one_did_not_come_back_are_not_called_back() -> None:
    """Guards: the time back to level 0 of the repeats that came back, shown for all; moves of all repeats as one's."""
    runs = []
    for number, level in ((2, 0), (4, 0), (6, 1)):
        run = made_up("morphserve", 0.1, 0, {"0": 75, "1": 25}, 0.02)
        first, last = run.series
        away = replace(first, t_s=3.0, level=1, waiting=2)
        last = replace(last, level=level, transitions={"degrade/committed": number})
        runs.append(replace(run, series=[first, away, last]))
    summary = summarize(WORKLOAD, "w", Slo(), runs)
    assert summary.rows[0]["level_zero_after_s"] is None and summary.rows[0]["transitions_by_outcome"] == {
        "degrade/committed": 4
    }
    assert "morphserve: not back at level 0 when the run, or one of its repeats, ended." in summary.notes
    assert summarize(WORKLOAD, "w", Slo(), runs[:2]).rows[0]["level_zero_after_s"] == 9.0


def made_up(name: str, ttft_s: float, level: int | None, tokens: dict[str, int] | None, kl: float) -> RunResult:
    """A run in which every request had this TTFT."""
    outcomes = [
        Outcome(i, float(i), 5, 3, float(i), i + ttft_s + 1, "ok", ttft_s, ttft_s + 0.2, [0.1, 0.1], 3, "abc")
        for i in range(10)
    ]
    first = Snapshot(0.0, level=level, waiting=0, running=0, blocks_published=49, blocks_used=3)
    last = replace(first, t_s=12.0, tokens_by_level=tokens or {})
    status = {"ladder": [{"level": k, "expected_kl": k * kl} for k in range(3)]} if tokens else None
    return RunResult(name, 1, Path("out") / name, Slo(), Replayed(outcomes, 0.0, 12.0), [first, last], status)


def test_report_is_one_self_contained_page(tmp_path: Path) -> None:
    """Guards the page: it must open anywhere, and say what was bought and what it cost."""
    runs = [
        replace(made_up("stock", 5.0, None, None, 0.0), directory=tmp_path / "stock"),
        replace(made_up("morphserve", 0.1, 0, {"0": 75, "1": 25}, 0.02), directory=tmp_path / "morphserve"),
    ]
    summary = summarize(WORKLOAD, "<w>.jsonl", Slo(), runs)
    assert summary.headline == (
        "SLO violations 100 % → 0 % (first token late 100 % → 0 %, tokens slow 0 % → 0 %); P95 TTFT 5.00 s → 0.10 s, "
        "P95 TPOT 100 ms → 100 ms; price: 25 % of tokens at level ≥ 1, expected KL 0.005 nats/token"
    )
    page = write_report(summary, runs, tmp_path).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "What it bought" in page and "What it cost" in page
    assert "&lt;w&gt;.jsonl" in page and "<w>" not in page
    stored = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert [r["name"] for r in stored["runs"]] == ["stock", "morphserve"]
    assert "| SLO violations, of requests sent | 100 % | 0 % |" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("baseline", "says"),
    [
        (("static_w8", 0.1, 1, {"1": 100}, 0.004), True),  # as few violations, cheaper
        (("static_w8", 0.1, 1, {"1": 100}, 0.03), False),  # as few violations, dearer
        (("static_w8", 5.0, 1, {"1": 100}, 0.004), False),  # cheaper, but violates
        (("stock", 0.1, None, None, 0.0), True),  # the load never needed morphing
        (("stock", 5.0, None, None, 0.0), False),
    ],
)
def test_report_says_when_a_static_baseline_dominates(baseline: tuple[Any, ...], says: bool) -> None:
    """Guards honesty: where no policy was needed, the report itself must say so."""
    runs = [made_up("morphserve", 0.1, 0, {"0": 75, "1": 25}, 0.02), made_up(*baseline)]
    notes = summarize(WORKLOAD, "w", Slo(), runs).notes
    assert any("dominates" in note for note in notes) is says


def test_who_misses_a_limit_by_less_is_not_dominated() -> None:
    """Guards: 'stock dominates' where all requests miss one limit on both sides and waits shrank from 50 s to 1 s."""
    slow = Slo(2.0, 0.05)  # both need 100 ms a token
    morph = replace(made_up("morphserve", 1.0, 0, {"0": 75, "1": 25}, 0.02), slo=slow)
    stock = replace(made_up("stock", 50.0, None, None, 0.0), slo=slow)
    summary = summarize(WORKLOAD, "w", slow, [stock, morph])
    assert "first token late 100 % → 0 %, tokens slow 100 % → 100 %" in summary.headline
    (note,) = summary.notes
    assert "stock has no more violations than MorphServe (100 % against 100 %), yet does not dominate" in note
    assert "fewer beyond the TTFT limit (0 % against 100 %), P95 TTFT 1.00 s against 50.0 s" in note
    both_late = replace(stock, slo=replace(slow, ttft_s=0.5)), replace(morph, slo=replace(slow, ttft_s=0.5))
    (note,) = summarize(WORKLOAD, "w", slow, both_late).notes
    assert note.endswith("yet does not dominate: MorphServe has P95 TTFT 1.00 s against 50.0 s.")


def small_workload(tmp_path: Path) -> Path:
    """Three requests at once."""
    workload = tmp_path / "w.jsonl"
    workload.write_text('{"timestamp": 10, "input_length": 6, "output_length": 3}\n' * 3, encoding="utf-8")
    return workload


def small_corpus(tmp_path: Path) -> str:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS, encoding="utf-8")
    return str(corpus)


def tokenizer(tmp_path: Path) -> str:
    """The directory of one that has a token for each word of the corpus."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    words = sorted(set(CORPUS.split()))
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    (directory / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}})
    )
    return str(directory)


def test_command_line_ends_with_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the interface that make demo reads: the last line on stdout is the document."""
    with serve(FAKE, tmp_path / "server.log") as server:
        code = main(
            ["--corpus", small_corpus(tmp_path), "--workload", str(small_workload(tmp_path)),
             "--url", server.url, "--name", "there", "--quiet",
             "--out", f"{tmp_path}/o", "--tokenizer", tokenizer(tmp_path), "--slo-ttft-s", "60", "--slo-tpot-ms",
             "60000"],
        )  # fmt: skip
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert list(document) == ["workload", "slo", "dtype", "fit", "runs", "report"]
    assert document["slo"] == {"ttft_s": 60.0, "tpot_s": 60.0}
    assert [list(run) for run in document["runs"]] == [list(ROW_KEYS)]
    assert (document["runs"][0]["name"], document["runs"][0]["violation_rate"]) == ("there", 0.0)
    assert Path(document["report"]).is_file()
    result = json.loads((tmp_path / "o" / "there" / "result.json").read_text(encoding="utf-8"))
    assert result["input_lens"] == [6, 6, 6]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--slo-tpot-ms", "inf"), ("--slo-ttft-s", "0"), ("--request-timeout", "-1"), ("--poll", "nan")],
)
def test_times_that_are_none_are_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    """Guards: a run that is measured and cannot be saved, or violates everything without a word."""
    workload = tmp_path / "w.jsonl"
    workload.write_text('{"timestamp": 10, "input_length": 6, "output_length": 3}\n', encoding="utf-8")
    arguments = ["--workload", str(workload), "--url", "http://127.0.0.1:1", "--out", f"{tmp_path}/o"]
    assert main([*arguments, "--tokenizer", "t", option, value]) == 1
    assert f"{option} is {float(value):g}, must be a number" in capsys.readouterr().err


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Puts back what a command line has set."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_as_ctrl_c_does(signum: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: servers that stay when the terminal is closed."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def job() -> dict[str, Any]:
        signal.raise_signal(signum)
        return {}

    assert run_command("mine", job, "servers stopped") == 130
    assert "mine: interrupted; servers stopped" in capsys.readouterr().err


def test_two_servers_take_turns_and_each_pair_swaps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a plugin that looks slower because it always comes second, and a ratio of requests that failed."""
    order: list[str] = []
    closed_loop = paired._closed_loop

    async def noted(url: str, model: str, loop: ClosedLoop) -> float:
        order.append(url)
        return await closed_loop(url, model, loop)

    monkeypatch.setattr(paired, "_closed_loop", noted)
    servers = {"stock": FAKE, "plugin": replace(FAKE, extra_args=("--plugin", "morphserve"))}
    loop = ClosedLoop([[1, 2], [3]], concurrency=2, requests=3, output_tokens=2)
    ratios: list[float] = []
    result, status = compare_idle(servers, tmp_path / "idle", loop, 2, lambda pair, ratio: ratios.append(ratio))
    assert ratios == list(result.ratios) and status["tokens_by_level"]["0"] == 3 * 3 * 2
    stock, plugin = order[:2]  # the warm-up
    assert order[2:] == [stock, plugin, plugin, stock] and stock != plugin
    assert {log.name for log in (tmp_path / "idle").iterdir()} == {"stock.log", "plugin.log"}


@pytest.mark.parametrize(("pairs", "quantile"), [(2, 12.71), (16, 2.131), (17, 2.120), (40, 2.023)])
def test_the_bound_of_a_ratio_is_students(pairs: int, quantile: float) -> None:
    """Guards: a bound too kind where the table of quantiles ends."""
    ratios = tuple(1.0 + 0.01 * (number % 2) for number in range(pairs))
    found = PairedResult((1.0,) * pairs, ratios)
    half_width = (found.mean - found.lower) / (statistics.stdev(ratios) / math.sqrt(pairs))
    assert half_width == pytest.approx(quantile, abs=2e-3)


@pytest.mark.usefixtures("own_signals")
def test_nohup_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a sweep of hours, started under nohup, that ends with the terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def job() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGHUP)
        return {"done": True}

    assert run_command("mine", job, "") == 0


@pytest.mark.usefixtures("own_signals")
def test_a_full_disk_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a traceback for a file that cannot be written."""

    def job() -> dict[str, Any]:
        (tmp_path / "missing" / "file").write_text("")
        return {}

    assert run_command("mine", job, "") == 1
    assert "mine: [Errno 2] No such file or directory: " in capsys.readouterr().err


def test_command_line_explains_a_bad_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback as the answer to a typo."""
    assert main(["--workload", "none.jsonl", "--dry-run"]) == 1
    assert "none.jsonl" in capsys.readouterr().err
