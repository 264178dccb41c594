"""What was logged, where vLLM's logging has been set up by a test before."""

from __future__ import annotations

import logging

import pytest


def records_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Each record once: vLLM's logging may hand one to several handlers."""
    return list({id(record): record for record in caplog.records}.values())
