"""`morphserve prepare MODEL`: all that is measured of a model, once, and kept where a server finds it."""

from __future__ import annotations

from morphserve.tools.prepare.cli import main

__all__ = ["main"]
