"""Which room stands on which? The rooms of .importlinter and the imports between them, drawn as docs/rooms.md.

Rooms, top floor first, are the layers of the contract `floors`; arrows are imports that the code has today.
Output: a Mermaid chart in Markdown. Last stdout line: one JSON document {"rooms", "floors", "arrows", "file"}.

    python scripts/draw_rooms.py --out docs/rooms.md
"""

from __future__ import annotations

import configparser
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import grimp

from morphserve.tools.command import command_parser, finish

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("morphserve", "quant_layers", "kv_resize", "policies")

_HEAD = (
    "# Rooms",
    "",
    "Drawn from the imports by `python scripts/draw_rooms.py`; AGENTS.md says what each room holds. An arrow points at",
    "what a room stands on; what a longer way says too is left out.",
    "",
)

Floors = Sequence[Sequence[str]]
Arrows = Sequence[tuple[str, str]]


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "rooms.md")
    args = parser.parse_args(argv)
    floors = read_floors(ROOT / ".importlinter")
    arrows = find_arrows(floors)
    args.out.write_text(draw(floors, arrows), encoding="utf-8")
    rooms = sum(map(len, floors))
    return finish({"rooms": rooms, "floors": len(floors), "arrows": len(arrows), "file": str(args.out)})


def read_floors(file: Path) -> list[list[str]]:
    """List the rooms of each floor, top floor first, as import-linter proves them."""
    parser = configparser.ConfigParser()
    parser.read(file, encoding="utf-8")
    lines = parser["importlinter:contract:floors"]["layers"].split("\n")
    return [[room.strip() for room in line.split("|")] for line in lines if line.strip()]


def find_arrows(floors: Floors) -> list[tuple[str, str]]:
    """Pair each room with those that its modules import from, lazily or at load."""
    rooms = [room for floor in floors for room in floor]
    graph = grimp.build_graph(*_PACKAGES, cache_dir=None)
    found = set()
    for module in graph.modules:
        here = _room_of(module, rooms)
        for imported in graph.find_modules_directly_imported_by(module):
            there = _room_of(imported, rooms)
            if here and there and here != there:
                found.add((here, there))
    return sorted(found)


def draw(floors: Floors, arrows: Arrows) -> str:
    """Write the chart; an arrow that a longer way says too is left out."""
    shown = _without_shortcuts(arrows)
    lines = [*_HEAD, "```mermaid", "flowchart TD"]
    for number, floor in enumerate(floors):
        lines.append(f'  subgraph floor{number}[" "]')
        lines += [f'    {_id(room)}["{room.removeprefix("morphserve.")}"]' for room in floor]
        lines.append("  end")
    lines += [f"  {_id(here)} --> {_id(there)}" for here, there in shown]
    return "\n".join([*lines, "```", ""])


def _room_of(module: str, rooms: Iterable[str]) -> str | None:
    return max((room for room in rooms if module == room or module.startswith(f"{room}.")), key=len, default=None)


def _without_shortcuts(arrows: Arrows) -> list[tuple[str, str]]:
    below: dict[str, set[str]] = {}
    for here, there in arrows:
        below.setdefault(here, set()).add(there)

    def reach(room: str, seen: set[str]) -> set[str]:
        for there in below.get(room, ()):
            if there not in seen:
                seen.add(there)
                reach(there, seen)
        return seen

    return [
        (here, there)
        for here, there in arrows
        if not any(there in reach(other, set()) for other in below[here] - {there})
    ]


def _id(room: str) -> str:
    return room.replace(".", "_")


if __name__ == "__main__":
    sys.exit(main())
