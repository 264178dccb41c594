"""What a part is given: where to run, for how long, and where to put what it finds."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from morphserve.tools.gpucheck.machine import torch_facts
from morphserve.tools.gpucheck.results import Figure, Findings, Verdict, summarize, write_findings

T = TypeVar("T")
_ERROR_CHARS = 1500


class Skip(Exception):
    """A part cannot run here; the message says why."""


class OutOfTime(Exception):
    """What a part waited for was not there when its time was over; the message says what."""


class Bench:
    """Findings of one part, written down as they come: what kills the process later does not take them along."""

    def __init__(
        self,
        device: str,
        dry: bool,
        budget_s: float,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_cut: bool = False,
    ) -> None:
        """
        Args:
            device: "cuda", or "cpu" in a dry run.
            dry: tiny sizes and stand-ins; nothing found is a GPU figure.
            budget_s: a part measures as often as this allows; beyond it, it is killed.
            file: where findings go; None = nowhere.
            clock: seconds.
            is_cut: the budget is less than the part's own, since the whole check has no more time.
        """
        self.is_cut = is_cut
        self.device = device
        self.dry = dry
        self.budget_s = budget_s
        self.findings = Findings()
        self._file = file
        self._clock = clock
        self._start = clock()

    @property
    def left_s(self) -> float:
        """Seconds of the budget."""
        return self.budget_s - (self._clock() - self._start)

    def pick(self, real: T, dry: T) -> T:
        """Return a size: `real` on a device, `dry` where only the code path is tried."""
        return dry if self.dry else real

    def figure(self, name: str, unit: str, values: Sequence[float] | float) -> Figure:
        """Record a quantity.

        Raises:
            ValueError: see `summarize`.
        """
        figure = summarize(name, unit, [values] if isinstance(values, int | float) else values)
        self.findings.figures.append(figure)
        self._save()
        return figure

    def require(self, name: str, ok: bool, detail: str = "") -> None:
        """Note a pass criterion: if it does not hold, the part has failed."""
        self._verdict(Verdict(name, bool(ok), detail, required=True))

    def expect(self, name: str, ok: bool, detail: str = "") -> None:
        """Note what the design hopes for: a speed, say. Missing it is a finding, not a failure."""
        self._verdict(Verdict(name, bool(ok), detail, required=False))

    def note(self, text: str) -> None:
        """Anything else a reader must know."""
        self.findings.notes.append(text)
        self._save()

    def _verdict(self, verdict: Verdict) -> None:
        self.findings.verdicts.append(verdict)
        self._save()

    def _save(self) -> None:
        if self._file is not None:
            write_findings(self._file, self.findings)


def run_part(module: str, bench: Bench) -> Findings:
    """Call a module's `run`, or what "module:function" names. What it raises becomes `error` or `skipped`."""
    try:
        name, _, function = module.partition(":")
        run: Callable[[Bench], None] = getattr(importlib.import_module(name), function or "run")
        bench.findings.environment = torch_facts()
        run(bench)
    except Skip as e:
        bench.findings.skipped = str(e)
    except OutOfTime as e:
        if bench.is_cut:
            bench.findings.out_of_time = f"{e} Run the part alone."
        else:  # what is not there in all its time hangs
            bench.findings.error = str(e)
    except Exception as e:
        where = traceback.format_exc()[-_ERROR_CHARS:]
        bench.findings.error = f"{type(e).__name__}: {e}"[:_ERROR_CHARS]
        bench.findings.notes.append(where)
    bench.findings.finished = True
    bench._save()
    return bench.findings
