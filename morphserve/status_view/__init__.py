"""What an operator sees of a server: its status in words, for `morphserve watch`, `morphserve status` and the page.

All three show this and nothing else. docs/watching.md says what the status has. A server of another version may lack a
part of it: then that line says so, and the others stand.
"""

from __future__ import annotations

from morphserve.status_view.panel import UNTOLD, panels
from morphserve.status_view.parts import Bar, Change, LevelRow, Line, Panel, Tone
from morphserve.status_view.words import duration

__all__ = ["Bar", "Change", "LevelRow", "Line", "Panel", "Tone", "UNTOLD", "duration", "panels"]
