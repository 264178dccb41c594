"""What a machine must have before anything runs: a Python, room on the disk, a vLLM that answers, a model to try.

Standard library only, and written so that Pythons too old for the rest can say so: the checkout's bootstrap.py runs it
before anything is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphserve.setup.machine_checks import (
    LOCKS,
    NEWEST,
    OLDEST,
    SetupError,
    check_disk,
    exclusive,
    find_python,
    run_quiet,
    say,
)
from morphserve.setup.pip_progress import GIB, explain_pip_failure, run_showing, size_on_disk
from morphserve.setup.vllm_install import (
    OPTIONAL_PACKAGES,
    broken_packages,
    complete_vllm,
    is_stand_in,
    provide_vllm_metadata,
)

if TYPE_CHECKING:
    from morphserve.setup.machine_checks import Runner

__all__ = [
    "GIB",
    "LOCKS",
    "NEWEST",
    "OLDEST",
    "OPTIONAL_PACKAGES",
    "Runner",
    "SetupError",
    "broken_packages",
    "check_disk",
    "complete_vllm",
    "exclusive",
    "explain_pip_failure",
    "find_python",
    "is_stand_in",
    "provide_vllm_metadata",
    "run_quiet",
    "run_showing",
    "say",
    "size_on_disk",
]
