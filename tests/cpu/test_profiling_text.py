"""What goes into profiling and what comes out of it: windows of text, pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from morphserve.errors import ProfilingError
from morphserve.tools.apart import add_bind_option, bind_cores, run_apart
from morphserve.tools.profile import measure, measure_apart, token_windows
from quant_layers import ProfileLevel

pytestmark = pytest.mark.cpu


def test_windows_at_another_offset_are_other_text(tmp_path: Path) -> None:
    """Guards: a level that is measured on the text it was calibrated on."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join("x" * i for i in range(40)))
    count = type("Count", (), {"encode": lambda _, text: [len(word) for word in text.split()]})()
    first = token_windows(count, [text], 2, 8)
    other = token_windows(count, [text], 2, 8, 0.5)
    assert not set(first.flatten().tolist()) & set(other.flatten().tolist())


def test_meetings_are_read_as_text(tmp_path: Path) -> None:
    """Guards: braces and quotes of the file taken for language."""
    from morphserve.tools.profile.text import read_text

    file = tmp_path / "meetings.jsonl"
    turns = [{"speaker": "A", "content": "hello"}, {"speaker": "B", "content": "goodbye"}]
    file.write_text(json.dumps({"meeting_transcripts": turns}) + "\n")
    assert read_text(file) == "A: hello\nB: goodbye"
    file.write_text("{}\n")
    with pytest.raises(ProfilingError, match="cannot be read"):
        read_text(file)


def test_levels_are_measured_by_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a word that the command does not know, at the end of an hour of profiling."""
    asked: list[Any] = []

    def run(command: list[str], *_: Any) -> dict[str, Any]:
        args = measure._parser("").parse_args(command[3:])
        levels = measure.read_levels(args.levels, ("w8", "w4"))
        asked.append((command[1:3], args.model, levels, args.text, args.windows, args.timed))
        return {"rows": [{"kl": 0.5}]}

    monkeypatch.setattr(measure, "run_apart", run)
    document = measure_apart("here", [{2: "w8"}, {}], "--text", Path("a.txt"), "--windows", 4, "--timed")
    assert document["rows"] == [{"kl": 0.5}]
    module = ["-m", "morphserve.tools.profile.measure"]
    assert asked == [(module, "here", [{2: "w8"}, {}], [Path("a.txt")], 4, True)]


def test_a_command_of_its_own_says_how_far_it_is_and_why_it_ended() -> None:
    """Guards: minutes without a word; the document, or the reason of a failure, lost among what vLLM logs."""
    seen: list[tuple[str, int, int]] = []

    def run(code: str) -> dict[str, Any]:
        return run_apart([sys.executable, "-c", code], "it failed", "it", lambda *words: seen.append(words))

    lines = ("a log line", "progress 1 2", "progress 2 2", '{"rows": []}', "INFO: the end")
    assert run(f"print(*{lines!r}, sep=chr(10))") == {"rows": []}
    assert seen == [("it", 1, 2), ("it", 2, 2)]
    with pytest.raises(ProfilingError, match=r"it failed[^.]*no room for the KV cache"):
        run("import sys; print('many lines'); sys.exit('no room for the KV cache')")


def test_a_command_of_its_own_imports_nothing_from_where_it_is_run() -> None:
    """Guards: a module that somebody has put into the directory in which a command, or an idle server, stands."""
    code = "import json, sys; print(json.dumps({'path': sys.path}))"
    assert "" not in run_apart([sys.executable, "-c", code], "it failed", "it", lambda *_: None)["path"]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    """Guards: a picture that fails at the end of an hour of profiling."""
    from morphserve.tools.profile.plots import plot_frontier, plot_orders

    predicted = (
        ProfileLevel({}, 0.0, 0.0, 0, 1.0),
        ProfileLevel({0: "w8"}, 0.01, None, 2**20),
        ProfileLevel({0: "w4"}, 0.2, None, 2**21),
    )
    measured = (ProfileLevel({}, 0.0, 0.0, 0, 1.0), ProfileLevel({0: "w8"}, 0.01, 0.012, 2**20, 0.8))
    plot_frontier({"layers": predicted, "halves": measured}, tmp_path / "frontier.png")
    plot_orders([1, 2], {"ours": {"kl": [0.1, 0.2], "std": [0.0, 0.01]}}, tmp_path / "orders.png")
    for name in ("frontier.png", "orders.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_a_process_that_ends_well_and_says_nothing_has_failed() -> None:
    """Guards: a traceback of json for a child that left no answer."""
    for code in ("print('done')", "print('{')"):
        with pytest.raises(ProfilingError, match=r"^it failed: .* ended without an answer \(it said: .*\)\. Try again"):
            run_apart([sys.executable, "-c", code], "it failed", "it", lambda *_: None)


@pytest.mark.parametrize(
    ("words", "before", "bound"), [([], None, "auto"), ([], "2-3", "2-3"), (["--cpu-bind", "0"], "2-3", "0")]
)
def test_an_engine_that_is_timed_has_the_cores_of_a_server(
    monkeypatch: pytest.MonkeyPatch, words: list[str], before: str | None, bound: str
) -> None:
    """Guards: step times of one core for a server of all, or of other cores than were asked for."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")
    if before is None:
        monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    else:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", before)
    parser = argparse.ArgumentParser()
    add_bind_option(parser)
    assert bind_cores(parser.parse_args(words)) == bound
    assert os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") == bound
