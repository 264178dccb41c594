"""The commands in scripts/ begin and end alike: --help is the docstring, the last line is one JSON document."""

from __future__ import annotations

import importlib
import json

import commands
import pytest

pytestmark = pytest.mark.cpu

NAMES = (
    "bench_controller", "bench_idle", "bench_kernels", "bench_kv", "bench_profile", "bench_swap", "calibrate",
    "check_seams", "compare_orders", "draw_rooms", "measure_kl", "profile_layers", "quantize", "soak",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_help_is_the_docstring(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a command that is run once in a year, and ends in a traceback before it has read its options."""
    command = importlib.import_module(name)
    help_only = {"description": command.__doc__} if name in ("calibrate", "measure_kl") else {}
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"], **help_only)
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and str(command.__doc__).strip() in shown


def test_the_last_line_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: figures that only people can read, or a failure that looks like a success."""
    assert commands.finish({"step_ms_p50": commands.ms([0.003, 0.001, 0.002])}) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"step_ms_p50": 2.0}
    assert commands.fail("soak", "level 0 is not reached") == 1
    assert capsys.readouterr().err == "soak: level 0 is not reached\n"
