"""What a part finds, on its way into files and tables: figures, verdicts, the machine they are of."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest

from morphserve.tools.gpucheck import machine
from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.results import Findings, PartResult, read_findings, write_findings
from morphserve.tools.gpucheck.tables import render


def test_findings_survive_a_writer_that_is_killed(tmp_path: Path) -> None:
    """Guards: figures of a part in a file cut in half."""
    file = tmp_path / "findings.json"
    assert read_findings(file) is None
    bench = Bench("cpu", True, 10.0, file)
    bench.figure("speed", "us", [1.0, 2.0])
    bench.expect("it is fast", False, "2 us")
    before = read_findings(file)
    assert before is not None and asdict(before) == asdict(bench.findings)
    with pytest.raises(TypeError):
        write_findings(file, Findings(environment={"not": object()}))
    assert read_findings(file) == before
    (tmp_path / "half.json").write_text(file.read_text()[:40])
    assert read_findings(tmp_path / "half.json") is None


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_what_was_not_measured_is_no_figure(values: list[float]) -> None:
    """Guards: a table with NaN in it, and JSON that nobody can read."""
    with pytest.raises(ValueError, match="a figure needs at least 1, all finite"):
        Bench("cpu", True, 1.0).figure("speed", "us", values)


def test_spreads_are_what_they_are_called() -> None:
    """Guards: quartiles off by one sample, a p99 below the third quartile."""
    found = Bench("cpu", True, 1.0).figure("speed", "us", [float(value) for value in range(101)][::-1])
    assert (found.median, found.q1, found.q3, found.p99, found.least, found.most) == (50, 25, 75, 99, 0, 100)
    one = Bench("cpu", True, 1.0).figure("speed", "us", 7)
    assert (one.repeats, one.median, one.q1, one.p99) == (1, 7, 7, 7)


def test_a_part_knows_what_is_left_of_its_budget() -> None:
    """Guards: repeats that go on until the part is killed."""
    now = iter([0.0, 4.0, 11.0])
    bench = Bench("cpu", True, 10.0, clock=lambda: next(now))
    assert (bench.left_s, bench.left_s) == (6.0, -1.0)


def test_the_machine_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: fields in another order, "[N/A]" taken for a value, a driver's version taken for a number, what nobody
    knows written down."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$1" in -L) echo "GPU 0: NVIDIA H200 (UUID: x)";;\n'
        '--query-gpu=name*) echo "NVIDIA H200, 580.20, 143771, 1980";;\n'
        "--query-gpu=memory.total) echo 143771;;\n"
        '*) echo "345, 3201, 31, [N/A], 4";; esac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.missing_device() is None
    monkeypatch.setattr(machine, "_PACKAGES", ("no-such-package",))
    monkeypatch.setattr("morphserve.tools.machine.cpu_name", lambda: "unknown")
    found = machine.describe_host()
    assert found["cores"] and not {"cpu", "no-such-package"} & found.keys()
    assert (found["gpu"], found["driver"], found["sm_max_mhz"]) == ("NVIDIA H200", "580.20", 1980.0)
    assert machine.read_sensors() == {
        "sm_mhz": 345.0, "memory_mhz": 3201.0, "temperature_c": 31.0, "memory_used_mib": 4.0
    }  # fmt: skip
    assert machine.device_bytes() == 143771 << 20
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert machine.read_sensors() == {} and machine.device_bytes() == 80 << 30


def test_words_do_not_break_the_tables() -> None:
    """Guards: a reason with a bar or a line break in it that shifts every column."""
    text = render({"gpu": "a|b"}, [PartResult("t1", "arena", "failed", "two\nlines | a bar")], dry=False)
    assert "| gpu | a\\|b |" in text and "| t1 | arena | failed | | 0 | two lines \\| a bar |" in text
    assert "DRY" not in text
