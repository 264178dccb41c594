"""Windows of traces as a user writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cpu.tuning_world import burst

from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.evaluate import load_windows
from morphserve.tools.workload import WorkloadError, WorkloadSpec
from morphserve.tools.workload.windows import parse_window

pytestmark = pytest.mark.cpu


def test_options_of_a_window_are_those_of_replay() -> None:
    """Guards: a policy is tuned on other traffic than the same words give in scripts/replay.py."""
    spec = parse_window(
        "a:b.csv:window=221,72:thin=4.75:rate-scale=2:input_scale=1/16:input_clip=8,120:output_scale=0.5"
        ":output_clip=4,384:num_requests=9:seed=3"
    )
    assert spec == WorkloadSpec(
        Path("a:b.csv"), (221.0, 72.0), 4.75, 2.0, 1 / 16, (8, 120), 0.5, (4, 384), 9, 3
    )  # fmt: skip
    assert parse_window("plain.jsonl") == WorkloadSpec(Path("plain.jsonl"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jsonl:thinn=4", "unknown option 'thinn'; there are window, thin"),
        ("a.jsonl:thin=many", "thin='many' is not a number or a fraction"),
        ("a.jsonl:input_scale=1/0", "input_scale='1/0' is not"),
        ("a.jsonl:window=3", "is not START,LEN in seconds"),
        ("a.jsonl:thin=2:thin=3", "thin is given twice"),
    ],
)
def test_bad_options_are_refused(text: str, words: str) -> None:
    """Guards: a mistyped option becomes part of the file's name, or is ignored."""
    with pytest.raises(WorkloadError, match=words.replace("(", r"\(")):
        parse_window(text)


def test_a_list_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    """Guards: files of a list are looked for where the command runs, or an option of an entry is lost."""
    burst(tmp_path / "a.jsonl")
    entries = [{"file": "a.jsonl", "thin": 2, "window": [0, 1.5]}, "a.jsonl", {"file": "synthetic:7,duration=30"}]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(entries))
    listed, _ = load_windows([str(tmp_path / "list.yaml")], [])
    a = tmp_path / "a.jsonl"
    typed, _ = load_windows([f"{a}:thin=2:window=0,1.5", str(a), "synthetic:7,duration=30"], [])
    assert [w.digest for w in listed] == [w.digest for w in typed]
    assert len({w.digest for w in listed}) == len({w.name for w in listed}) == 3
    (tmp_path / "list.yaml").write_text("- {thin: 2}\n")
    with pytest.raises(WorkloadError, match="entry 0 is .* needs a `file`"):
        load_windows([str(tmp_path / "list.yaml")], [])


def test_held_out_must_be_something_else(tmp_path: Path) -> None:
    """Guards: the score that shall tell whether tuning overfitted is taken on what was tuned on."""
    a, b = burst(tmp_path / "a.jsonl"), burst(tmp_path / "b.jsonl")
    with pytest.raises(TuningError, match="held-out .*b.jsonl is also a dev window"):
        load_windows([str(a)], [str(b)])
    dev, held_out = load_windows([str(a)], [f"{b}:rate_scale=2"])
    assert len(dev) == len(held_out) == 1
    with pytest.raises(TuningError, match="Give --dev TRACE"):
        load_windows([], [str(b)])


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    """Guards: a window without requests scores 0 % violations."""
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(WorkloadError, match="no requests"):
        load_windows([str(tmp_path / "none.jsonl")], [])
    with pytest.raises(WorkloadError, match="nothing left"):
        load_windows([f"{burst(tmp_path / 'a.jsonl')}:window=500,10"], [])
