"""The command `morphserve`: `table` names what it can do, `dispatch` runs it; here is only what no other room has."""

from __future__ import annotations

from morphserve.commands.dispatch import main

__all__ = ["main"]
