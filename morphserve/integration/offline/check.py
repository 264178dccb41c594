"""`morphserve check`: can MorphServe run here, in which dtype and formats, and why not. Needs no model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys

from morphserve import cpu_tier
from morphserve.errors import ConfigError
from morphserve.integration import seams
from morphserve.integration.offline.check_report import Machine
from morphserve.integration.offline.dtype_check import DTYPES, check_dtype
from morphserve.version import SUPPORTED_VLLM

AUTO = "auto"


def check(dtype: str, as_json: bool) -> int:
    """Print what was found. Exit status 0 when a server with the plugin and the default ladder can start here.

    Args:
        dtype: of the server; 'auto' = the one that serves best here.
        as_json: print one JSON document instead of text.
    """
    with contextlib.redirect_stdout(sys.stderr):  # where vLLM logs as it is imported
        machine = examine(dtype)
    sys.stdout.write(json.dumps(machine.document(), indent=1) + "\n" if as_json else machine.text())
    return 0 if machine.ok else 1


def examine(dtype: str = AUTO) -> Machine:
    """Check every row of the seam table, and test and time every kernel for every dtype."""
    problems = []
    vllm, device, rows = None, "cpu", ()
    try:
        vllm = importlib.metadata.version("vllm")
        rows = tuple(seams.check_all())  # importing what the rows name also loads vLLM's operators
        device = str(seams.resolve("vllm.platforms:current_platform.device_type")[2])
        _require_platform()
    except importlib.metadata.PackageNotFoundError:
        problems.append(f"vLLM is not installed; install vLLM {SUPPORTED_VLLM}")
    except (ImportError, RuntimeError, OSError, ConfigError) as e:  # it cannot be imported, or the device is not served
        problems.append(str(e))
    if broken := [row for row in rows if not row.ok]:
        problems.append(f"{len(broken)} of {len(rows)} seams do not hold. {seams.remedy(broken)}.")
    tested_on = device if device == "cuda" else "cpu"
    tier, best, on_cpu = cpu_tier.machine_tier(), DTYPES[0], False
    if device == "cpu" and tier is not None:  # else the platform was refused, or it is a GPU that counts
        on_cpu = True
        try:
            tier, best = cpu_tier.tier(), cpu_tier.best_dtype()
        except ConfigError as e:
            problems.append(str(e))
    return Machine(
        vllm=vllm,
        device=device,
        cpu=cpu_tier.cpu_name(),
        tier=tier,
        machine_tier=cpu_tier.machine_tier(),
        best_dtype=best,
        dtype=best if dtype == AUTO else dtype,
        dtypes={name: check_dtype(name, tested_on, with_base=bool(rows) and on_cpu) for name in DTYPES},
        seams=rows,
        machine_problems=tuple(problems),
    )


def _require_platform() -> None:
    from morphserve.integration.start import check_platform  # imports what needs vLLM

    check_platform()
