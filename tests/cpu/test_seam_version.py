"""Which vLLM is attached to: one inside the range, or one that a user wants to try and in which every row holds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from morphserve.errors import SeamError
from morphserve.integration.seams import Seam, check, check_version, require_all
from morphserve.version import SUPPORTED_VLLM, UNPROVEN_CUDA, UNPROVEN_VLLM

HOLDS = Seam("holds", "json:dumps", ("obj",), "test")
GONE = Seam("moved", "json:no_such", (), "test")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a vLLM of some version in place, of which one row asks."""
    monkeypatch.setattr(check, "SEAMS", (HOLDS,))
    monkeypatch.delenv(UNPROVEN_VLLM, raising=False)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    check._warn_once.cache_clear()

    def install(version: str) -> None:
        stub = ModuleType("vllm")
        stub.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", stub)

    return install


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1+cpu"])
def test_a_supported_version_needs_no_word(
    installed: Callable[[str], None], version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: a proven version refused; the switch, left on, turns each of its starts into a warning."""
    installed(version)
    for tried in ("0", "1"):
        monkeypatch.setenv(UNPROVEN_VLLM, tried)
        require_all()
    assert said(caplog) == []


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.34.0rc1+cpu"])
def test_another_version_is_refused_by_name(
    installed: Callable[[str], None], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an untested vLLM is patched because its names happen to match, or because a GPU is to be tried, or with
    the switch off; a refusal that does not say which it is, what is supported and how to try it."""
    installed(version)
    monkeypatch.setenv(UNPROVEN_CUDA, "1")
    for off in ("", "0"):
        monkeypatch.setenv(UNPROVEN_VLLM, off)
        assert not check_version().ok
    monkeypatch.delenv(UNPROVEN_VLLM)
    with pytest.raises(SeamError) as refused:
        require_all()
    for part in (f"installed {version}, supported {SUPPORTED_VLLM}", f"Install vllm{SUPPORTED_VLLM}"):
        assert part in str(refused.value)
    assert f"set {UNPROVEN_VLLM}=1 to try" in str(refused.value) and "1 of 2 seams" in str(refused.value)


def test_another_version_can_be_tried(
    installed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: a new vLLM that nobody can try before we have; one that starts without a word, or with one at each start
    of an engine in the process."""
    installed("0.34.0")
    monkeypatch.setenv(UNPROVEN_VLLM, "1")
    for _ in range(2):
        require_all()
    (warned,) = said(caplog)
    assert "0.34.0" in warned and SUPPORTED_VLLM in warned and UNPROVEN_VLLM in warned
    assert check_version().ok


@pytest.mark.parametrize("rows", [(HOLDS, GONE), (GONE,)])
def test_another_version_in_which_a_row_is_gone_is_not_tried(
    installed: Callable[[str], None], rows: tuple[Seam, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: the switch for another version also lets a vLLM pass that would be patched half-way; a refusal that
    advises the switch where it does not help."""
    installed("0.34.0")
    monkeypatch.setattr(check, "SEAMS", rows)
    for tried in ("0", "1"):
        monkeypatch.setenv(UNPROVEN_VLLM, tried)
        with pytest.raises(SeamError, match=r"moved \(json:no_such\)") as refused:
            require_all()
        assert f"set {UNPROVEN_VLLM}=1" not in str(refused.value)
