"""A server's panels as plain text: for pipes, logs and narrow places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from morphserve.status_view import Panel
from morphserve.tools.tables import text_table

_LABEL_WIDTH = 12


def as_text(panels: Sequence[Panel]) -> str:
    """Return everything, engine by engine."""
    return "\n\n".join("\n".join(_lines(panel)) for panel in panels) + "\n"


def one_liners(panels: Sequence[Panel]) -> list[str]:
    """Return a line an engine; its name stands there where there are several."""
    return [f"{panel.title}: {panel.summary}" if len(panels) > 1 else panel.summary for panel in panels]


def plain(text: str) -> str:
    """Return text without what a terminal would take for a command: reasons and errors come from elsewhere."""
    return "".join(char if char.isprintable() else " " for char in text)


def _lines(panel: Panel) -> Iterator[str]:
    yield panel.title
    for bar in panel.bars:
        yield f"  {bar.label:{_LABEL_WIDTH}} {bar.text}"
    for line in panel.lines:
        note = f"  ({plain(line.note)})" if line.note else ""
        yield f"  {line.label:{_LABEL_WIDTH}} {plain(line.text)}{note}"
    if panel.levels:
        yield "  ladder"
        head = ("level", "layers", "KV blocks", "KL", "tokens", "")
        rows = [(r.level, r.layers, r.kv_blocks, r.kl, r.tokens, r.mark) for r in panel.levels]
        yield from (f"    {row}" for row in text_table(head, rows))
    if panel.changes:
        yield "  last transitions"
        ended = [(c.ago, c.move, c.outcome, c.took, plain(c.why)) for c in panel.changes]
        yield from (f"    {row}" for row in text_table(("", "levels", "outcome", "took", "why"), ended))
