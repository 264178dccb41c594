"""The panels on a terminal, drawn anew at each look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel as Box
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from morphserve.status_view import Bar, Change, Line, Panel, Tone, duration
from morphserve.tools.watch.text import plain

_STYLES: dict[Tone, str] = {"": "", "good": "green", "warn": "yellow", "bad": "bold red"}
_NARROW = 70  # columns: below, notes have no room of their own
_FEW_LEVELS = 4  # rows of the ladder to each side of the level
_FEW_CHANGES = 6


class ScreenView:
    """The whole terminal, given back as it was at the end."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live = Live(console=self.console, screen=True, auto_refresh=False)

    def __enter__(self) -> ScreenView:
        self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.stop()

    def show(self, shown: Sequence[Panel], error: str, since_s: float) -> None:
        """Draw the panels; with an `error` they are those of `since_s` seconds ago."""
        self._live.update(draw(shown, error, since_s, self.console.width), refresh=True)


def draw(shown: Sequence[Panel], error: str, since_s: float, width: int) -> RenderableType:
    """Return the screen: what is wrong, all engines where there are several, then each of them."""
    parts: list[RenderableType] = []
    if error:
        parts.append(Text(f"{plain(error)} What follows is {duration(since_s)} old.", style=_STYLES["bad"]))
    if len(shown) > 1:
        parts.append(_overview(shown))
    parts += [_box(panel, width) for panel in shown]
    parts.append(Text("Ctrl-C ends the view, not the server.", style="dim"))
    return Group(*parts)


def _overview(shown: Sequence[Panel]) -> Table:
    table = Table.grid(padding=(0, 2))
    for panel in shown:
        table.add_row(panel.title, Text(panel.summary, style=_STYLES[panel.tone]))
    return table


def _box(panel: Panel, width: int) -> Box:
    parts: list[RenderableType] = [_figures(panel, width)]
    if panel.levels:
        parts += [Text(), _ladder(panel, width)]
    if panel.changes:
        parts += [Text(), _last(panel.changes, width)]
    return Box(Group(*parts), title=panel.title, title_align="left", border_style=_STYLES[panel.tone] or "none")


def _figures(panel: Panel, width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for bar in panel.bars:
        table.add_row(bar.label, Text(bar.text))
        table.add_row("", _bar(bar, width))
    for line in panel.lines:
        table.add_row(line.label, _said(line, width))
    return table


def _bar(bar: Bar, width: int) -> ProgressBar:
    style = _STYLES[bar.tone]
    return ProgressBar(100, 100 * bar.share, max(min(40, width - 20), 8), complete_style=style, finished_style=style)


def _said(line: Line, width: int) -> Text:
    text = Text(plain(line.text), style=_STYLES[line.tone])
    if line.note and width >= _NARROW:
        text.append(f"  {plain(line.note)}", style="not bold dim default")
    return text


def _ladder(panel: Panel, width: int) -> Table:
    here = next((i for i, row in enumerate(panel.levels) if row.mark == "here"), 0)
    first = max(min(here - _FEW_LEVELS, len(panel.levels) - 2 * _FEW_LEVELS - 1), 0)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("level", "KV blocks", "KL", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    if width >= _NARROW:
        table.add_column("layers", overflow="fold")
    for row in panel.levels[first : first + 2 * _FEW_LEVELS + 1]:
        sign = {"here": "* ", "target": "> "}.get(row.mark, "")
        cells = [f"{sign}{row.level}", row.kv_blocks, row.kl, row.tokens, *([row.layers] if width >= _NARROW else [])]
        table.add_row(*map(Text, cells), style="reverse" if row.mark == "here" else "")
    return table


def _last(changes: Sequence[Change], width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("last transitions", no_wrap=True)
    table.add_column("levels", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("why", overflow="ellipsis" if width >= _NARROW else "fold", no_wrap=width >= _NARROW)
    for change in changes[:_FEW_CHANGES]:
        why = plain(change.why) if change.outcome == "committed" else f"{change.outcome}: {plain(change.why)}"
        table.add_row(change.ago, change.move, change.took, Text(why, style=_STYLES[change.tone]))
    return table
