"""Command lines that are nonsense: each ends at once, in one line that names the value, with the right status."""

from __future__ import annotations

from pathlib import Path

import pytest

from morphserve.commands import main
from morphserve.commands.table import COMMANDS

pytestmark = pytest.mark.cpu

NOWHERE = "~nosuchuser/x"
NO_HOME = "nobody here has that home directory"
UNDER_A_FILE = ("{tmp}/file/x", "Not a directory. Give a place that exists and can be written to")
SIMULATE = ("simulate", "--workload", "convD", "--compare", "stock,morphserve")
TUNE = ("tune", "--config", "demo", "--dev", "convD", "--held-out", "convE")

NO_MODEL = "model: '{tmp}/no/such/model' is neither a directory nor a hub repository"
# words of the command line, words of the message; status 1: the command understood, and what it names is no good
FAILS: list[tuple[tuple[str, ...], str]] = [
    (("init", NOWHERE), NO_HOME),
    (("init", "{tmp}/none/x"), "No such file or directory"),
    (("init", "{tmp}"), "exists and is left as it is"),
    (("init", "--monitoring", "{tmp}/none"), "No such file or directory"),
    (("init", "--monitoring", NOWHERE), NO_HOME),
    (("inspect", NOWHERE), "No such file or directory"),
    (("inspect", "{tmp}/file"), "Not a directory"),
    (("replay-log", NOWHERE), NO_HOME),
    (("replay-log", "{tmp}"), "Is a directory"),
    (("replay-log", "{tmp}/file", "--policy", "{tmp}/empty.yaml"), "is empty. Write what is to differ"),
    (("replay-log", "{tmp}/file", "--policy", NOWHERE), NO_HOME),
    (("replay", "--workload", NOWHERE, "--dry-run"), NO_HOME),
    (("replay", "--workload", "{tmp}/none.jsonl", "--dry-run"), "No such file or directory"),
    (("replay", "--workload", "{tmp}/file", "--dry-run"), "are none of the known layouts"),
    (("replay", "--workload", "conv_whole", "--dry-run"), "is a list of windows: `morphserve sweep --window"),
    (("replay", "--workload", "convD", "--rate-scale", "1e-300", "--dry-run"), "must be 1e-06 to 1e+06"),
    (("replay", "--workload", "convD", "--model", "m", "--config", "demo", "--out", UNDER_A_FILE[0]), UNDER_A_FILE[1]),
    ((*SIMULATE, "--config", "demo", "--step-times", NOWHERE, "--out", "{tmp}/new"), "home directory"),
    ((*SIMULATE, "--config", "demo", "--step-times", "{tmp}/times.json", "--out", UNDER_A_FILE[0]), UNDER_A_FILE[1]),
    ((*SIMULATE, "--config", NOWHERE, "--step-times", "{tmp}/times.json", "--out", "{tmp}/new"), NO_HOME),
    ((*SIMULATE, "--config", "{tmp}/empty.yaml", "--step-times", "{tmp}/file", "--out", "{tmp}/new"), "is empty"),
    ((*SIMULATE, "--step-times", "{tmp}/times.json", "--temperature", "1", "--out", "{tmp}/new"), "starts no server"),
    (("simulate", "--workload", "convD", "--fit", "--step-times", "{tmp}/file", "--out", "{tmp}/new"), "not JSON"),
    (("sweep", "--simulate", "--window", "{tmp}/twice.yaml", "--step-times", "{tmp}/file", "--out", "{tmp}/new"),
     "key 'file' is given twice"),
    (("sweep", "--simulate", "--window", "convD", "--step-times", "{tmp}/file", "--out", UNDER_A_FILE[0]),
     UNDER_A_FILE[1]),
    ((*TUNE, "--step-times", "{tmp}/file", "--out", UNDER_A_FILE[0]), UNDER_A_FILE[1]),
    ((*TUNE, "--step-times", "{tmp}/file", "--out", "{tmp}/new", "--space", "{tmp}/twice.yaml"), "is given twice"),
    (("measure-kl", "m", "--text", "{tmp}/none"), "--text {tmp}/none: No such file or directory"),
    (("measure-kl", "m", "--text", "{tmp}/binary"), "not UTF-8 text"),
    (("measure-kl", "m", "--text", "{tmp}/empty.yaml"), "there is nothing in it"),
    (("measure-kl", "m", "--predict-text", NOWHERE), NO_HOME),
    (("measure-kl", "m", "--variant", "w4"), "must be FORMAT=..., and formats are"),
    (("measure-kl", "m", "--variant", "w5={tmp}"), "must be FORMAT=..., and formats are"),
    (("measure-kl", "m", "--variant", "w4={tmp}"), "--variant w4={tmp}: {tmp}/config.json: No such file"),
    (("measure-kl", "m", "--variant", "w4=" + NOWHERE), NO_HOME),
    (("measure-kl", "m", "--kernel", "w8"), "must be FORMAT=..., and formats are"),
    (("measure-kl", "m", "--kernel", "w8=fast"), "--kernel w8=fast: kernels of w8 are w8a8_vnni"),
    (("measure-kl", "m", "--kernel", "w8=w8_plain", "--kernel", "w8=w8_plain"), "w8 has w8_plain already"),
    (("measure-kl", "m", "--levels", "{tmp}/none"), "--levels {tmp}/none: No such file or directory"),
    (("measure-kl", "m", "--rungs", "{tmp}/file"), "It must be a JSON list of levels"),
    (("measure-kl", "m", "--levels", "{tmp}/levels.json"), "no format is called w5. Formats are"),
    (("profile", "m", "--out", UNDER_A_FILE[0]), UNDER_A_FILE[1]),
    (("profile", "m", "--out", "{tmp}/new", "--plot", "{tmp}"), "--plot {tmp} is a directory"),
    (("profile", "m", "--out", "{tmp}/new", "--text", "{tmp}/none"), "--text {tmp}/none: No such file or directory"),
    (("profile", "m", "--out", NOWHERE), NO_HOME),
    (("calibrate", "m", "--out", "{tmp}/none/times.json"), "No such file or directory. Give a place"),
    (("calibrate", "m", "--out", "{tmp}"), "--out {tmp} is a directory"),
    (("calibrate", "m", "--out", NOWHERE), NO_HOME),
    (("measure-kl", "{tmp}/no/such/model"), NO_MODEL),
    (("chaos", "{tmp}/no/such/model"), NO_MODEL),
    (("quantize", "{tmp}/no/such/model", "--out", "{tmp}/new", "--environment", "{tmp}/env"), NO_MODEL),
    (("quantize", "m", "--out", UNDER_A_FILE[0]), UNDER_A_FILE[1]),
    (("quantize", "m", "--out", "{tmp}/new", "--text", "{tmp}/none"), "--text {tmp}/none: No such file or directory"),
    (("quantize", "m", "--out", "{tmp}/new", "--environment", NOWHERE), NO_HOME),
    (("prepare", "m", "--text", "{tmp}/none"), "--text {tmp}/none: No such file or directory"),
    (("prepare", "m", "--cache-dir", UNDER_A_FILE[0]), UNDER_A_FILE[1]),
    (("prepare", "m", "--cache-dir", NOWHERE), NO_HOME),
    (("served-kl", "{tmp}/none"), "no run with recorded answers"),
    (("served-kl", "{tmp}/run"), "top_logprobs.npz is damaged, or not of a replay"),
    (("served-kl", NOWHERE), NO_HOME),
    (("soak", "--read", "{tmp}/none"), "No such file or directory"),
    (("gpu-check", "--out", UNDER_A_FILE[0]), UNDER_A_FILE[1]),
]  # fmt: skip

# status 2: the command line itself is wrong
USAGE: list[tuple[tuple[str, ...], str]] = [
    (("replay", "--workload", "convD", "--thin", "1e400/0"), "'1e400/0' is not a number"),
    (("replay", "--workload", "convD", "--input-clip", "1"), "'1' is not LO,HI"),
    (("measure-kl", "m", "--windows", "0"), "0 is too few, must be at least 1"),
    (("measure-kl", "m", "--offset", "1"), "1 is out of bounds, must be 0 or more, below 1"),
    (("measure-kl", "m", "-tp", "0"), "0 is too few"),
    (("profile", "m", "--out", "x", "--moves-per-level", "0"), "0 is too few"),
    (("profile", "m", "--out", "x", "--length", "many"), "'many' is not a whole number"),
    (("calibrate", "m", "--rounds", "0"), "0 is too few"),
    (("quantize", "m", "--out", "x", "--samples", "-1"), "-1 is too few"),
    (("prepare", "m", "--windows", "0"), "0 is too few"),
    (("served-kl", "m", "--answers", "0"), "0 is too few"),
    (("soak", "--minutes", "nan"), "nan is out of bounds, must be above 0"),
    (("gpu-check", "--minutes", "inf"), "inf is out of bounds"),
    (("status", "--url", "ftp://x"), "is no address of a server"),
    (("watch", "--interval", "-1"), "-1"),
]  # fmt: skip


def name_of(value: tuple[str, ...] | str) -> str:
    return " ".join(value) if isinstance(value, tuple) else ""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("no json, no csv\n", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe text")
    (tmp_path / "empty.yaml").write_text("", encoding="utf-8")
    (tmp_path / "twice.yaml").write_text("- {file: a, file: b}\n", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"setup": {"model": "m"}}', encoding="utf-8")
    (tmp_path / "run" / "top_logprobs.npz").write_text("no archive", encoding="utf-8")
    (tmp_path / "levels.json").write_text('[{"0": "w5"}]', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("words", "said"), FAILS, ids=name_of)
def test_what_a_command_is_given_is_no_good(
    words: tuple[str, ...], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a traceback, or a message after minutes of work, for what can be known at once."""
    before = sorted(place.rglob("*"))
    assert main([word.format(tmp=place) for word in words]) == 1
    found = capsys.readouterr()
    assert found.err.count("\n") == 1 and found.err.startswith(f"morphserve {words[0]}: "), found.err
    assert said.format(tmp=place) in found.err and found.out == ""
    assert sorted(place.rglob("*")) == before, "nothing is left behind"


@pytest.mark.parametrize(("words", "said"), USAGE, ids=name_of)
def test_a_command_line_that_is_wrong(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a division by zero after minutes, or a number that is none taken for one."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_every_command_that_takes_a_file_is_here() -> None:
    """Guards: a new command that nobody has given nonsense."""
    tried = {words[0] for words, _ in [*FAILS, *USAGE]}
    without = {"demo", "check", "pin", "restore", "pause", "resume", "drain"}
    assert {command.name for command in COMMANDS} - tried == without, "these take no file of the user's but a token"
