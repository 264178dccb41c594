"""`python -m morphserve check`: can MorphServe run here, in which formats, and if not, why. Needs no model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from morphserve.errors import ConfigError
from morphserve.integration import seams
from morphserve.ladder import DEFAULT_FORMATS
from morphserve.version import SUPPORTED_VLLM, __version__
from quant_layers import FORMATS, KernelReport, by_preference, probe

DTYPES = ("bfloat16", "float16")
_WIDTH = 160  # where the output is no terminal


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found here."""

    vllm: str | None  # version; None = not installed
    device: str
    dtype: str  # of activations
    seams: tuple[seams.SeamResult, ...]
    kernels: tuple[KernelReport, ...]
    chosen: dict[str, str | None]  # format |-> kernel that runs it unless `kernels:` names one
    problems: tuple[str, ...]  # each of them stops a server with the plugin

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that can stand in a ladder here."""
        return tuple(fmt for fmt, kernel in self.chosen.items() if kernel is not None)

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "ok": not self.problems,
            "problems": list(self.problems),
            "morphserve": __version__,
            "vllm": self.vllm,
            "supported_vllm": SUPPORTED_VLLM,
            "torch": torch.__version__,
            "device": self.device,
            "dtype": self.dtype,
            "formats": self.chosen,
            "default_formats": list(DEFAULT_FORMATS),
            "kernels": [
                {
                    "kernel": report.name,
                    "format": report.format,
                    "runs": report.ok,
                    "default": self.chosen[report.format] == report.name,
                    "reason": report.reason,
                }
                for report in self.kernels
            ],
            "seams": [
                {"name": r.seam.name, "target": r.seam.target, "holds": r.ok, "detail": r.detail, "why": r.seam.why}
                for r in self.seams
            ],
        }


def check(dtype: str, as_json: bool) -> int:
    """Print what was found. Exit status 0 when a server with the plugin can start here."""
    with contextlib.redirect_stdout(sys.stderr):  # where vLLM logs as it is imported
        machine = examine(dtype)
    if as_json:
        sys.stdout.write(json.dumps(machine.document(), indent=1) + "\n")
    else:
        _print(machine)
    return 1 if machine.problems else 0


def examine(dtype: str = DTYPES[0]) -> Machine:
    """Check every row of the seam table, and test every kernel."""
    problems = []
    vllm, device, rows = None, "cpu", ()
    try:
        vllm = importlib.metadata.version("vllm")
        rows = tuple(seams.check_all())  # importing what the rows name also loads vLLM's operators
        device = str(seams.resolve("vllm.platforms:current_platform.device_type")[2])
        _require_platform()
    except importlib.metadata.PackageNotFoundError:
        problems.append(f"vLLM is not installed; install vLLM {SUPPORTED_VLLM}")
    except (ImportError, ConfigError) as e:  # a vLLM that cannot be imported, or a device that is not served
        problems.append(str(e))
    if broken := sum(not row.ok for row in rows):
        problems.append(f"{broken} of {len(rows)} seams do not hold; install vLLM {SUPPORTED_VLLM}")
    tested_on = device if device == "cuda" else "cpu"
    reports = probe(getattr(torch, dtype), tested_on)
    chosen = {fmt: _first(fmt, tested_on, reports) for fmt in FORMATS}
    if not any(chosen.values()):
        problems.append(f"no kernel runs any format with {dtype} activations here; see the reasons above")
    return Machine(vllm, device, dtype, rows, tuple(reports.values()), chosen, tuple(problems))


def _require_platform() -> None:
    from morphserve.integration.checks import check_platform  # imports what needs vLLM

    check_platform()


def _first(fmt: str, device: str, reports: dict[str, KernelReport]) -> str | None:
    return next((make.name for make in by_preference(fmt, device) if reports[make.name].ok), None)


def _print(machine: Machine) -> None:
    console = Console(highlight=False, soft_wrap=True) if sys.stdout.isatty() else Console(width=_WIDTH, soft_wrap=True)
    vllm = machine.vllm or "not installed"
    console.print(
        f"morphserve {__version__}, vLLM {vllm} (supported {SUPPORTED_VLLM}), torch {torch.__version__}, "
        f"device {machine.device}, {machine.dtype} activations",
        markup=False,
    )
    table = Table("format", "kernel", "runs", "why not", box=box.SIMPLE)
    for report in machine.kernels:
        default = machine.chosen[report.format] == report.name
        runs = "yes, by default" if default else "yes" if report.ok else "no"
        table.add_row(report.format, report.name, runs, Text(report.reason))
    console.print(table)
    broken = [row for row in machine.seams if not row.ok]
    for row in broken:
        console.print(f"FAIL {row.seam.name}  {row.seam.target}: {row.detail}; {row.seam.why}", markup=False)
    console.print(f"{len(machine.seams)} seams, {f'{len(broken)} do NOT hold' if broken else 'all hold'}")
    if machine.problems:
        console.print("MorphServe can NOT run here: " + "; ".join(machine.problems), markup=False)
        return
    console.print(f"MorphServe can run here. Formats for `ladder.steps`: {', '.join(machine.formats)}", markup=False)
    if missing := [fmt for fmt in DEFAULT_FORMATS if fmt not in machine.formats]:
        console.print(
            f"The default ladder is {', '.join(DEFAULT_FORMATS)}: no kernel runs {', '.join(missing)}, so list "
            "`ladder.steps` without it.",
            markup=False,
        )
