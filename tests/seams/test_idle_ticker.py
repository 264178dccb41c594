"""The thread that wakes an idle engine, which reads what another thread writes."""

from __future__ import annotations

import logging
import queue
from typing import Any

import pytest
from seams.logged import records_of
from vllm.v1.engine import EngineCoreRequestType

from morphserve.integration.engine import idle_ticker
from morphserve.integration.engine.idle_ticker import IdleTicker

pytestmark = pytest.mark.seams


def test_an_error_costs_one_wake_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: an idle server that stays at its level until the next request, and a log that says nothing of it."""
    monkeypatch.setattr(idle_ticker, "WAKE_INTERVAL_S", 0.0)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    answers = [True, True, True]

    def claims() -> bool:
        if len(answers) > 1:
            answers.pop()
            raise RuntimeError("Set changed size during iteration")
        return bool(answers and answers.pop())

    woken: queue.Queue[Any] = queue.Queue()
    ticker = IdleTicker(woken, claims)
    try:
        assert woken.get(timeout=10) == (EngineCoreRequestType.WAKEUP, None)
    finally:
        ticker.close()
    (line,) = [each for each in records_of(caplog) if each.name == "vllm.morphserve"]
    assert line.levelname == "WARNING" and line.exc_info and "costs a wake-up of the idle engine" in line.getMessage()
