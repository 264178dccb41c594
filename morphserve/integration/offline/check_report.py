"""What `morphserve check` found: as text, and as a JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from morphserve import cpu_tier
from morphserve.control import DEFAULT_FORMATS, TIMED_BATCHES
from morphserve.integration.offline.dtype_check import DtypeReport
from morphserve.integration.seams import SeamResult
from morphserve.version import SUPPORTED_VLLM, __version__
from policies import BASE_FORMAT

_CLEARLY = 1.25  # a dtype so many times as fast as the one that is served is worth a line
_BATCHES = ", ".join(map(str, TIMED_BATCHES))


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found here."""

    vllm: str | None  # version; None = not installed
    device: str
    cpu: str
    tier: str | None  # of the CPU, or the one that is emulated; None = no x86-64 CPU with AVX2
    machine_tier: str | None
    best_dtype: str  # in which a bf16 model is served fastest, by what the CPU has
    dtype: str  # that is asked about
    dtypes: dict[str, DtypeReport]
    seams: tuple[SeamResult, ...]
    machine_problems: tuple[str, ...]  # each stops a server with the plugin, whatever its dtype

    @property
    def served(self) -> DtypeReport:
        """Of the dtype that is asked about."""
        return self.dtypes[self.dtype]

    @property
    def problems(self) -> tuple[str, ...]:
        """Each stops a server in this dtype."""
        return self.machine_problems + ((self.served.problem,) if self.served.problem else ())

    @property
    def ok(self) -> bool:
        """A server with the plugin can start in this dtype."""
        return not self.problems

    @property
    def fastest_dtype(self) -> str | None:
        """In which level 0 took least at the largest batch; None = not measured."""
        measured = {name: _base_s(report) for name, report in self.dtypes.items() if report.times}
        return min(measured, key=lambda name: measured[name][-1]) if measured else None

    def document(self) -> dict[str, Any]:
        """Return the document of `--json`."""
        return {
            "ok": self.ok,
            "problems": list(self.problems),
            "morphserve": __version__,
            "vllm": self.vllm,
            "supported_vllm": SUPPORTED_VLLM,
            "torch": torch.__version__,
            "device": self.device,
            "cpu": self.cpu,
            "tier": self.tier,
            "machine_tier": self.machine_tier,
            "emulated": self.tier != self.machine_tier,
            "dtype": self.dtype,
            "best_dtype": self.best_dtype,
            "fastest_dtype": self.fastest_dtype,
            "formats": self.served.chosen,
            "default_formats": list(DEFAULT_FORMATS),
            "batches": list(TIMED_BATCHES),
            "dtypes": {name: self._dtype_document(report) for name, report in self.dtypes.items()},
            "seams": [
                {"name": r.seam.name, "target": r.seam.target, "holds": r.ok, "detail": r.detail, "why": r.seam.why}
                for r in self.seams
            ],
        }

    def _dtype_document(self, report: DtypeReport) -> dict[str, Any]:
        measured = report.factors
        return {
            "ok": not self.machine_problems and not report.problem,
            "problem": report.problem,
            "base": report.base,
            "base_ms": [round(1e3 * s, 4) for s in _base_s(report)],
            "formats": {
                fmt: {"kernel": kernel, "time_over_base": list(measured.get(fmt, ()))}
                for fmt, kernel in report.chosen.items()
            },
            "kernels": [
                {
                    "kernel": kernel.name,
                    "format": kernel.format,
                    "runs": kernel.ok,
                    "default": report.chosen[kernel.format] == kernel.name,
                    "reason": kernel.reason,
                }
                for kernel in report.kernels
            ],
        }

    def text(self) -> str:
        """Return it for a terminal or a file: plain columns, no line longer than what it says."""
        parts = [self._head(), self._speeds(), self._kernels(), self._seams(), self._verdict()]
        return "\n\n".join("\n".join(part) for part in parts if part) + "\n"

    def _head(self) -> list[str]:
        lines = [
            f"morphserve {__version__}, vLLM {self.vllm or 'not installed'} (supported {SUPPORTED_VLLM}), torch "
            f"{torch.__version__}, device {self.device}"
        ]
        if self.device == "cpu":
            emulated = f", emulated by {cpu_tier.VARIABLE}: the CPU has {self.machine_tier}"
            lines.append(f"{self.cpu}, tier {self.tier}{emulated if self.tier != self.machine_tier else ''}")
        return lines

    def _speeds(self) -> list[str]:
        rows = []
        for name, report in self.dtypes.items():
            if not report.times:
                continue
            base_ms = ", ".join(f"{1e3 * s:.2f}" for s in _base_s(report))
            rows.append((name, BASE_FORMAT, report.base, f"1  ({base_ms} ms)"))
            for fmt, measured in report.factors.items():
                rows.append(("", fmt, report.chosen[fmt] or "", ", ".join(f"{x:.2f}" for x in measured)))
        if not rows:
            return []
        title = "One decoder layer's linears (the demo model's shapes), one thread:"
        return [title, *columns([("dtype", "format", "kernel", f"time over base's at batches of {_BATCHES}"), *rows])]

    def _kernels(self) -> list[str]:
        rows = [("format", "kernel", "runs", "why not")]
        for kernel in self.served.kernels:
            default = self.served.chosen[kernel.format] == kernel.name
            runs = "yes, by default" if default else "yes" if kernel.ok else "no"
            rows.append((kernel.format, kernel.name, runs, kernel.reason))
        return [f"Kernels for {self.dtype} activations:", *columns(rows)]

    def _seams(self) -> list[str]:
        broken = [row for row in self.seams if not row.ok]
        lines = [f"FAIL {row.seam.name}  {row.seam.target}: {row.detail}; {row.seam.why}" for row in broken]
        return [*lines, f"{len(self.seams)} seams, {f'{len(broken)} do NOT hold' if broken else 'all hold'}"]

    def _verdict(self) -> list[str]:
        if not self.ok:
            others = [name for name in self.dtypes if name != self.dtype and not self.dtypes[name].problem]
            can = f" With --dtype {' or '.join(others)} it can." if others and not self.machine_problems else ""
            return [f"MorphServe can NOT run here in {self.dtype}: {'; '.join(self.problems)}.{can}"]
        left_out = [fmt for fmt in DEFAULT_FORMATS if fmt not in self.served.formats]
        without = f" The default ladder does without {' and '.join(left_out)}." if left_out else ""
        return [
            f"MorphServe can run here in {self.dtype}, with formats {', '.join(self.served.formats)}.{without}",
            *self._advice(),
        ]

    def _advice(self) -> list[str]:
        """Advise which dtype to serve, and say what was measured for and against it."""
        lines = []
        if self.best_dtype != "bfloat16":
            lines.append(f"Serve with --dtype {self.best_dtype}: below tier bf16 a CPU widens bf16 for every product.")
        elif self.dtype != self.best_dtype:
            lines.append(f"Serve in {self.best_dtype}, for which this CPU has instructions.")
        fastest = self.fastest_dtype
        best = self.dtypes[self.best_dtype]
        if fastest is not None and best.times:
            ratio = _base_s(best)[-1] / _base_s(self.dtypes[fastest])[-1]
            if ratio > _CLEARLY:
                lines.append(
                    f"Measured just now, level 0 in {fastest} was {ratio:.1f} times as fast as in {self.best_dtype} at "
                    f"a batch of {TIMED_BATCHES[-1]}: compare the two before you serve."
                )
        return lines


def _base_s(report: DtypeReport) -> list[float]:
    """Seconds of level 0's linears, one a batch."""
    return [sum(halves) for halves in report.times[BASE_FORMAT]] if report.times else []


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which the cells of all rows stand under one another; the last cell may be of any length."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    padded = ([*map(str.ljust, row[:-1], widths), row[-1]] for row in rows)
    return ["  " + "  ".join(cells).rstrip() for cells in padded]
