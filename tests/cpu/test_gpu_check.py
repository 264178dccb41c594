"""The frame of scripts/gpu_check.py: parts that crash, hang, run out of time or have no device, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from morphserve.tools.gpucheck import cli, frame
from morphserve.tools.gpucheck.frame import Options, judge, run_parts
from morphserve.tools.gpucheck.parts import PARTS, Part, choose
from morphserve.tools.gpucheck.results import Findings, PartResult, Verdict

ROOT = Path(__file__).parents[2]
FAKES = {
    "good": """
        def run(bench):
            bench.figure("speed", "us", [3.0, 1.0, 2.0])
            bench.require("it holds", True)
    """,
    "broken": """
        def run(bench):
            bench.require("it holds", True)
            raise ZeroDivisionError("no figure")
    """,
    "crash": """
        import os, signal
        def run(bench):
            bench.figure("speed", "us", 1.0)
            print("the last words", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
    """,
    "hang": """
        import subprocess, sys, threading
        def run(bench):
            child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
            bench.figure("speed", "us", 1.0)
            bench.note(str(child.pid))
            threading.Event().wait()
    """,
    "missed": """
        def run(bench):
            bench.require("it holds", False, "it was 7")
    """,
    "slow": """
        def run(bench):
            bench.require("it holds", True)
            bench.expect("it is fast", False, "it is not")
    """,
    "elsewhere": """
        from morphserve.tools.gpucheck.bench import Skip
        def run(bench):
            raise Skip("not on this machine")
    """,
    "idle": """
        def run(bench):
            pass
    """,
    "told": """
        def run(bench):
            bench.require("it is told all", (bench.device, bench.dry) == ("cpu", True) and 0 < bench.budget_s < 20)
    """,
}


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """Parts of the fakes can be imported by their processes."""
    for name, text in FAKES.items():
        (tmp_path / f"fake_{name}.py").write_text(textwrap.dedent(text))
    return Options("cpu", True, environment={"PYTHONPATH": str(tmp_path)})


def fake(name: str, budget_s: float = 20.0, least_s: float = 1.0) -> Part:
    return Part(name, f"the {name} one", f"fake_{name}", budget_s, least_s)


def ignore(results: Sequence[PartResult]) -> None:
    """No report."""


def test_a_crash_or_a_hang_costs_only_its_own_part(options: Options) -> None:
    """Guards: one part that takes the run, or its own figures, along; and what it started staying behind."""
    parts = [fake("crash"), fake("hang", budget_s=4.0), fake("broken"), fake("good")]
    crash, hang, broken, good = run_parts(parts, options, ignore)
    assert (crash.status, crash.reason) == ("failed", "its process died: signal SIGSEGV, figures found until then: 1")
    assert "the last words" in crash.output_tail and crash.findings.figures[0].median == 1.0
    assert hang.status == "failed" and hang.reason.startswith("killed: not done after 4 s, figures found until then: 1")
    assert [figure.name for figure in hang.findings.figures] == ["speed"]
    with pytest.raises(ProcessLookupError):
        _signal_unless_reaped(int(hang.findings.notes[0]))
    assert (broken.status, broken.reason) == ("failed", "ZeroDivisionError: no figure")
    assert good.status == "ok" and good.findings.figures[0].repeats == 3


def _signal_unless_reaped(pid: int) -> None:
    """Raises ProcessLookupError when nothing runs under this id; killed and not yet collected counts as that."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        state = "X"
    if state in "ZX":
        raise ProcessLookupError(pid)


def test_an_interrupted_run_leaves_no_process(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a part that holds the GPU for ever after Ctrl-C, or after the time limit of whoever called us."""
    started: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None:
            return wait(self)
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(frame, "read_sensors", dict)
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_parts([fake("hang")], options, ignore)
    assert [process.returncode for process in started] == [-9]


def test_what_a_part_found_decides(options: Options) -> None:
    """Guards: a missed criterion that passes, a missed hope that fails, a part that checked nothing and is fine."""
    names = ("missed", "slow", "elsewhere", "idle", "told")
    found = {r.part: (r.status, r.reason) for r in run_parts([fake(name) for name in names], options, ignore)}
    assert found["missed"] == ("failed", "it holds: it was 7")
    assert found["slow"] == ("ok", "")
    assert found["elsewhere"] == ("skipped", "not on this machine")
    assert found["idle"][0] == "failed" and "no pass criterion" in found["idle"][1]
    assert found["told"] == ("ok", "")


def test_an_exit_with_code_0_proves_nothing() -> None:
    """Guards: a process that ended in the middle, quietly, counted as done."""
    half = Findings(verdicts=[Verdict("it holds", True, "", True)])
    assert judge(half, 0, 5.0) == ("failed", "its process died: exit code 0, figures found until then: 0")
    assert judge(None, 0, 5.0) == ("failed", "its process died: exit code 0")


def test_parts_that_no_longer_fit_are_named(options: Options) -> None:
    """Guards: a part left out without a word, or started with too little time to end."""
    now = [0.0]
    started: list[str] = []

    def one(part: Part, options: Options, limit_s: float) -> PartResult:
        started.append(f"{part.key} {limit_s:g}")
        now[0] += 50
        return PartResult(part.key, part.title, "ok")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "run_one", one)
        parts = [fake("a", 60, 20), fake("b", 60, 20), fake("c", 60, 20), fake("d", 60, 2)]
        results = run_parts(parts, Options(minutes=2.0, clock=lambda: now[0]), ignore)
    assert started == ["a 60", "b 60", "d 17"]
    assert [r.status for r in results] == ["ok", "ok", "no time", "ok"]
    assert results[2].reason == "17 s of 2 minutes are left, it needs 20. Run it alone: --only c"
    assert cli.exit_code(results, None) == 4


def test_the_report_is_whole_after_each_part(options: Options, tmp_path: Path) -> None:
    """Guards: an hour of figures lost because the machine went away before the end."""
    seen: list[tuple[list[str], list[str]]] = []
    write = cli._write

    def spy(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        document = json.loads((tmp_path / "out/gpu_check.json").read_text())
        text = (tmp_path / "out/gpu_check.md").read_text()
        assert all(f"| {row['part']} | {row['title']}" in text for row in document["parts"])
        assert ("never reached" in text) == bool(document["not_run"])
        seen.append(([row["part"] for row in document["parts"]], document["not_run"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_write", spy)
        cli.check([fake("crash"), fake("good")], options, tmp_path / "out")
    assert seen == [([], ["crash", "good"]), (["crash"], ["good"]), (["crash", "good"], [])]


def test_the_last_line_is_a_document_and_says_that_it_was_dry(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a dry run's figures taken for a GPU's, and a log that keeps only its end without the outcome."""
    assert cli.check([fake("good"), fake("missed")], options, tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert document["dry_run"] is True and document["exit_code"] == 1
    assert document["parts"]["missed"] | {"s": 0} == {
        "status": "failed", "s": 0, "figures": 0, "reason": "it holds: it was 7", "missed": ["it holds"]
    }  # fmt: skip
    stored = json.loads((tmp_path / "gpu_check.json").read_text())
    assert stored["dry_run"] is True and "no figure in this report is of a GPU" in stored["warning"]
    assert stored["parts"][0]["findings"]["figures"][0]["median"] == 2.0
    text = (tmp_path / "gpu_check.md").read_text()
    assert "**DRY RUN" in text and "## good: the good one (dry run, no GPU)" in text and "| ok (dry) |" in text
    assert "| speed | us | 2 | 1.5 to 2.5 | 2.98 | 1 to 3 | 3 |" in text


def test_without_a_device_nothing_starts_and_the_exit_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: eleven failures, or a success, where there was nothing to measure."""
    monkeypatch.setattr(cli, "missing_device", lambda: "no NVIDIA device: none here")
    monkeypatch.setattr(frame, "run_one", lambda *args: pytest.fail("a part was started"))
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setenv("OUT", str(tmp_path / "given"))
    assert cli.main([]) == 3
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["status"] for row in document["parts"].values()} == {"skipped"} and len(document["parts"]) == 11
    assert all(row["reason"] == "no NVIDIA device: none here" for row in document["parts"].values())
    assert (tmp_path / "given/gpu_check.json").is_file() and document["dry_run"] is False


@pytest.mark.parametrize(
    ("statuses", "missing", "code"),
    [
        (("ok", "skipped"), None, 0),
        (("ok", "failed", "no time"), None, 1),
        (("skipped", "skipped"), "no NVIDIA device", 3),
        (("ok", "no time"), None, 4),
    ],
)
def test_exit_codes(statuses: tuple[str, ...], missing: str | None, code: int) -> None:
    """Guards: a failure that a script cannot see."""
    results = [PartResult(str(number), "", status) for number, status in enumerate(statuses)]  # type: ignore[arg-type]
    assert cli.exit_code(results, missing) == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu"], "go together"),
        (["--dry-run"], "go together"),
        (["--only", "t1,t77"], "no part t77; there are t1, t2"),
        (["--only", "t1", "--skip", "t1"], "leaves no part"),
        (["--minutes", "0"], "must be above 0"),
    ],
)
def test_wrong_arguments_are_refused_in_words(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a CPU's figures under a GPU's name, and a misspelt part that silently does not run."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_parts_are_chosen_by_key() -> None:
    """Guards: --skip that runs what it names."""
    assert [part.key for part in choose("T3, t1", "")] == ["t1", "t3"]
    assert [part.key for part in choose("", "t8,t9,t10,t11")] == [f"t{number}" for number in range(1, 8)]
    assert [part.key for part in PARTS] == [f"t{number}" for number in range(1, 12)]


def test_the_frame_loads_neither_torch_nor_vllm() -> None:
    """Guards: a parent that holds a CUDA context, and dies with a part's driver."""
    code = "import sys, morphserve.tools.gpucheck; "
    code += "sys.exit(str(sorted({'torch', 'vllm', 'pydantic'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
