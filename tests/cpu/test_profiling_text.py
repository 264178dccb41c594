"""What goes into profiling and what comes out of it: windows of text, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from morphserve.errors import ProfilingError
from morphserve.tools.profile import token_windows
from quant_layers import Rung

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


def test_pictures_are_drawn(tmp_path: Path) -> None:
    """Guards: a picture that fails at the end of an hour of profiling."""
    from morphserve.tools.profile.plots import plot_frontier, plot_orders

    predicted = (Rung({}, 0.0, 0.0, 0, 1.0), Rung({0: "w8"}, 0.01, None, 2**20), Rung({0: "w4"}, 0.2, None, 2**21))
    measured = (Rung({}, 0.0, 0.0, 0, 1.0), Rung({0: "w8"}, 0.01, 0.012, 2**20, 0.8))
    plot_frontier({"layers": predicted, "halves": measured}, tmp_path / "frontier.png")
    plot_orders([1, 2], {"ours": {"kl": [0.1, 0.2], "std": [0.0, 0.01]}}, tmp_path / "orders.png")
    for name in ("frontier.png", "orders.png"):
        assert (tmp_path / name).stat().st_size > 5000
