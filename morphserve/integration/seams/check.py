"""Does the seam table hold in the installed vLLM? It is imported, and asked.

All rows hold or the start fails with one message (never half installed).
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from morphserve.errors import SeamError
from morphserve.integration.seams.rows import SEAMS, Seam
from morphserve.version import SUPPORTED_VLLM, UNPROVEN_VLLM

logger = logging.getLogger("vllm.morphserve")

ORIGINAL = "_morphserve_original"  # of a wrapper of ours: what it calls


@dataclass(frozen=True, slots=True)
class SeamResult:
    """Whether a row holds on the installed vLLM."""

    seam: Seam
    ok: bool
    detail: str


def resolve(target: str) -> tuple[Any, str, Any]:
    """Return (owner, attribute name, value) of "module:a.b". Raises ImportError or AttributeError."""
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


def instance_attributes(value: Any) -> set[str]:
    """Return what an instance of a class has: what its classes have, and what their constructors store; of a function,
    what it stores: some state is made later than in a constructor."""
    if not inspect.isclass(value):
        return _stored(value)
    found: set[str] = set()
    for cls in inspect.getmro(value):
        found |= set(vars(cls)) | set(inspect.get_annotations(cls))
        for name in ("__init__", "__post_init__"):
            found |= _stored(vars(cls).get(name))
    return found


def _stored(function: Any) -> set[str]:
    """Names of the attributes that a function stores, on whatever object; of anything else none."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"} if code else set()


def check_seam(seam: Seam) -> SeamResult:
    """Import the target and compare its parameters."""
    try:
        _, _, value = resolve(seam.target)
    except Exception as e:  # an import can fail in many ways; each of them means: not our vLLM
        return SeamResult(seam, False, f"{type(e).__name__}: {e}")
    while getattr(value, ORIGINAL, None) is not None:
        value = getattr(value, ORIGINAL)
    if gone := sorted(set(seam.attributes) - instance_attributes(value)):
        return SeamResult(seam, False, f"instances have no {gone}")
    if not seam.params:
        return SeamResult(seam, True, "present")
    try:
        have = inspect.signature(value).parameters
    except (TypeError, ValueError) as e:
        return SeamResult(seam, False, f"no signature: {e}")
    missing = [p for p in seam.params if p not in have]
    if missing:
        return SeamResult(seam, False, f"parameters {missing} are gone; it has {list(have)}")
    return SeamResult(seam, True, "present, parameters match")


def check_version() -> SeamResult:
    """Check that the installed vLLM is inside the supported range, or that a user wants to try it all the same."""
    import vllm

    result = judge_version(vllm.__version__, "installed")
    if result.ok or os.environ.get(UNPROVEN_VLLM) != "1":
        return result
    return SeamResult(result.seam, True, f"{result.detail}; tried because of {UNPROVEN_VLLM}=1")


def judge_version(have: str | None, where: str) -> SeamResult:
    """Return whether a version, or None for one that is not known, is inside the supported range."""
    seam = Seam("version", "vllm:__version__", (), f"tested range {SUPPORTED_VLLM}")
    ok = have is not None and SpecifierSet(SUPPORTED_VLLM).contains(Version(have).base_version, prereleases=True)
    return SeamResult(seam, ok, f"{where} {have or 'no version'}, supported {SUPPORTED_VLLM}")


def check_all() -> list[SeamResult]:
    """Return one result a row, the version first."""
    return [check_version(), *(check_seam(seam) for seam in SEAMS)]


def require_all(more: Sequence[Seam] = ()) -> None:
    """Fail closed.

    Args:
        more: rows of the device that vLLM has found.

    Raises:
        SeamError: one message that names every row that does not hold.
    """
    version, *rows = *check_all(), *map(check_seam, more)
    if broken := [r for r in (version, *rows) if not r.ok]:
        lines = "\n".join(f"  {r.seam.name} ({r.seam.target}): {r.detail}" for r in broken)
        raise SeamError(
            f"MorphServe cannot run on this vLLM: {len(broken)} of {len(rows) + 1} seams do not hold:\n"
            f"{lines}\n{remedy(broken)}, or start without --plugin morphserve."
        )
    if UNPROVEN_VLLM in version.detail:
        _warn_once(version.detail)


def remedy(broken: Sequence[SeamResult]) -> str:
    """Return what helps against rows that do not hold: the beginning of a sentence."""
    install = f"Install vllm{SUPPORTED_VLLM}"
    if [r.seam.name for r in broken] != ["version"]:
        return install
    return f"{install}, set {UNPROVEN_VLLM}=1 to try this version, in which all else holds"


@functools.cache
def _warn_once(detail: str) -> None:
    logger.warning("morphserve: vLLM %s; no test has run with it", detail)
