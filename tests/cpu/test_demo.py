"""`morphserve demo`: which words it hands to the replay, and how it ends when it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from morphserve.commands import demo, main

pytestmark = pytest.mark.cpu


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that a replay was given; the model is there already."""
    given: list[list[str]] = []

    def replay(words: Sequence[str], prog: str) -> int:
        assert prog == "morphserve demo"
        given.append(list(words))
        return 0

    monkeypatch.setattr("morphserve.tools.bench.main", replay)
    monkeypatch.setattr(demo, "obtain", lambda cache, full: cache / "models" / "demo")
    monkeypatch.setenv("MORPHSERVE_CACHE", "/cache")
    return given


def test_the_demo_is_a_replay_and_own_words_win(replays: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: make demo and morphserve demo run something else, or an option that the demo overrides without a word."""
    assert main(["demo", "--full", "--workload", "hybB", "--dtype", "bfloat16"]) == 0
    (words,) = replays
    assert words[words.index("--model") + 1] == "/cache/models/demo"
    assert words[-4:] == ["--workload", "hybB", "--dtype", "bfloat16"] and "--fit" in words
    assert "stock,morphserve,static_w8,static_w4" in words
    assert capsys.readouterr().err == "Serve it: vllm serve /cache/models/demo --plugin morphserve\n"
    assert main(["demo", "--no-fit", "--model", "mine"]) == 0
    assert "--fit" not in replays[1] and replays[1][replays[1].index("--model") + 1] == "mine"


def test_the_model_alone(replays: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: `vllm serve $(morphserve demo --get-model)` is given more than the directory, or a replay starts."""
    assert main(["demo", "--get-model"]) == 0
    assert capsys.readouterr().out == "/cache/models/demo\n" and replays == []
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--get-model", "--workload", "hybB"])
    assert ended.value.code == 2


def test_a_cache_that_cannot_be_written_to_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a traceback on a machine whose home directory is read-only."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MORPHSERVE_CACHE", str(tmp_path / "file"))
    assert main(["demo", "--get-model"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("morphserve demo: [Errno ") and said.count("\n") == 1 and "MORPHSERVE_CACHE" in said
