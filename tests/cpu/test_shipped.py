"""What travels in the wheel, and that no word of the package sends its user to a file of the checkout."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from morphserve.commands import main
from morphserve.config import load_config
from morphserve.shipped import DEFAULT_CONFIG, SEARCH_SPACE, TEXT, config_file, text_file, workload_file
from morphserve.tools.workload import read_windows

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
PACKAGES = ("morphserve", "policies", "quant_layers", "kv_resize")
CHECKOUT = re.compile(  # `make PYTHON=` is said by the set-up of a checkout alone
    r"scripts/\w+\.py|scripts/(workloads|corpus)|policies/yaml|\[cpu\]'|pip install -e|"
    r"make:? (setup|(?!PYTHON=)[A-Z]+=)"
)


def test_no_message_names_a_file_of_the_checkout() -> None:
    """Guards: who has the wheel is told to run a file that he does not have."""
    suffixes = (".py", ".yaml", ".md")
    written = [file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.suffix in suffixes]
    assert len(written) > 250
    named = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in written
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if CHECKOUT.search(line)
    ]
    assert named == []


def _messages(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string of a module, but for its docstrings: those are read in a checkout, unless a command
    has one for its --help."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    helps = "command_parser(__doc__" in file.read_text(encoding="utf-8")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (id(node) not in alone or helps):
            yield node.lineno, node.value


def test_no_message_sends_its_reader_to_the_documentation_of_a_checkout() -> None:
    """Guards: who has the wheel is told that a remedy stands in a file that he does not have."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    found = [(file, *message) for file in files for message in _messages(file)]
    assert len(found) > 1000
    written = (ROOT / "policies" / "yaml" / "default.yaml").read_text(encoding="utf-8").splitlines()
    found += [(DEFAULT_CONFIG, number, line) for number, line in enumerate(written, 1)]
    named = [f"{file.relative_to(ROOT)}:{line}: {text}" for file, line, text in found if re.search(r"docs/\w", text)]
    assert named == []


def test_a_bare_name_is_the_shipped_file_unless_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a window that only the checkout has, or a user's own file that is passed over."""
    monkeypatch.chdir(tmp_path)
    assert workload_file("convD").name == workload_file("convD.jsonl").name == "convD.jsonl"
    assert (config_file("demo").name, text_file("wikitext2"), config_file("space.yaml")) == (
        "demo.yaml", TEXT, SEARCH_SPACE,
    )  # fmt: skip
    assert all(file.is_file() for file in (workload_file("convD"), config_file("demo"), TEXT))
    for name in ("./convD", "elsewhere/convD", "nothing", "synthetic:3,rate=2"):
        assert workload_file(name) == Path(name)
    (tmp_path / "convD").write_text("mine")
    assert workload_file("convD") == Path("convD")


def test_a_shipped_list_takes_a_trace_from_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a list whose trace may not be shipped asks for it beside itself, among the installed files."""
    assert [window.name for window in read_windows(["quiet"])][:2] == ["convD", "conv593"]
    monkeypatch.chdir(tmp_path)
    trace = yaml.safe_load(workload_file("conv_windows").read_text())[0]["file"]
    Path(trace).write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0000000,100,10\n")
    far = tmp_path / "installed"
    far.mkdir()
    (far / "few.yaml").write_text(yaml.safe_dump([trace]))
    (window,) = read_windows([str(far / "few.yaml")])
    assert len(window.workload.requests) == 1
    (far / trace).write_text(Path(trace).read_text() + "2023-11-16 18:00:01.0000000,100,10\n")
    (window,) = read_windows([str(far / "few.yaml")])
    assert len(window.workload.requests) == 2, "what lies beside the list comes first"


def test_init_writes_the_defaults_and_how_to_serve_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a config that changes what it claims to show, or that nobody knows how to use."""
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "vllm serve MODEL --plugin morphserve --morphserve-config morphserve.yaml"
    )
    assert Path("morphserve.yaml").read_text() == DEFAULT_CONFIG.read_text()
    assert main(["init", "my config.yaml"]) == 0
    assert capsys.readouterr().out.endswith("--morphserve-config 'my config.yaml'\n")
    assert load_config("my config.yaml") == load_config(DEFAULT_CONFIG)


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: hours of tuning lost to a word typed twice; a directory that is not there ends in a traceback."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("policy: {kind: static, level: 0}\n")
    assert main(["init", str(mine)]) == 1
    assert mine.read_text() == "policy: {kind: static, level: 0}\n"
    assert main(["init", str(tmp_path / "nowhere" / "mine.yaml")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "exists and is left as it is" in first and "No such file or directory. Give a file in" in second
