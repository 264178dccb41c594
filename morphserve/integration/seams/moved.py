"""What of the places where we touch vLLM has changed between two versions, read from their sources.

A row that holds in both may still mean something else: this says which bodies and signatures a reader of the next
version has to look at. Comments, docstrings and the layout of the text do not count.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import griffe

from morphserve.integration.seams.rows import Seam
from morphserve.integration.seams.source import locate
from morphserve.integration.seams.tree import SourceTree, Symbol, node_of

SAME, BODY, SIGNATURE, GONE = "same", "body", "signature", "gone"  # from what needs no look to what needs most
_CONSTRUCTORS = ("__init__", "__post_init__")

Part = tuple[tuple[str, ...], str]  # parameters, as they are written; everything else
_NOTHING: Part = ((), "")


@dataclass(frozen=True, slots=True)
class Move:
    """What has become of one row's target."""

    seam: Seam
    kind: str  # SAME, BODY, SIGNATURE or GONE: the largest of its parts'
    detail: str  # which parts: parameters that came and went, lines that changed
    diff: str  # all of it


def compare(rows: Iterable[Seam], before: SourceTree, after: SourceTree) -> list[Move]:
    """Return one move a row."""
    return [_move(row, before, after) for row in rows]


def _move(seam: Seam, before: SourceTree, after: SourceTree) -> Move:
    old, new = _parts(seam, before), _parts(seam, after)
    kinds, details, diffs = [SAME], [], []
    for name, was in old.items():
        part = new.get(name, _NOTHING)
        if part == was:
            continue
        lines = list(difflib.unified_diff(_lines(was), _lines(part), lineterm="", n=2))
        kind, detail = _change(was, part, lines)
        kinds.append(kind)
        details.append(f"{name}: {detail}")
        diffs += [f"{seam.name}: {name}", *lines[2:]]
    order = (SAME, BODY, SIGNATURE, GONE)
    return Move(seam, max(kinds, key=order.index), "; ".join(details), "\n".join(diffs))


def _change(was: Part, now: Part, lines: list[str]) -> tuple[str, str]:
    """Return (kind, detail) of one part that is not as it was."""
    if now == _NOTHING:
        return GONE, "gone"
    if now[0] == was[0]:
        return BODY, f"+{_count(lines, '+')} -{_count(lines, '-')} lines"
    changes = [f"-{one}" for one in was[0] if one not in now[0]] + [f"+{one}" for one in now[0] if one not in was[0]]
    return SIGNATURE, ", ".join(changes) or "in another order"


def _lines(part: Part) -> list[str]:
    return [*part[0], *part[1].splitlines()]


def _count(lines: list[str], sign: str) -> int:
    return sum(line.startswith(sign) for line in lines[2:])


def _parts(seam: Seam, tree: SourceTree) -> dict[str, Part]:
    """Return what a row speaks of, by name, as (signature, body)."""
    found = locate(seam.target, tree)
    name = seam.target.rpartition(":")[2]
    if isinstance(found, str):
        return {name: _NOTHING}
    if not isinstance(found.found, griffe.Class):
        return {name: _text(found.found)}
    members = {attribute: _member(found, attribute, tree) for attribute in seam.attributes}
    if seam.params or not members:
        members[name] = _outline(found, tree)
    return members


def _member(owner: Symbol, name: str, tree: SourceTree) -> Part:
    """Return what an instance's attribute is: a method, a field, or all that constructors store there."""
    classes, _ = tree.mro(owner)
    for cls in classes:
        if (one := cls.members.get(name)) is not None and not isinstance(one, griffe.Alias):
            return _text(one)
    stores = [
        ast.unparse(statement)
        for cls in classes
        for constructor in _CONSTRUCTORS
        if isinstance(function := cls.members.get(constructor), griffe.Function)
        for statement in ast.walk(node_of(function))
        if isinstance(statement, ast.Assign | ast.AnnAssign) and _stores(statement, name)
    ]
    return (), "\n".join(stores)


def _stores(statement: ast.Assign | ast.AnnAssign, name: str) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return any(isinstance(node, ast.Attribute) and node.attr == name for one in targets for node in ast.walk(one))


def _outline(owner: Symbol, tree: SourceTree) -> Part:
    """Return how a class is built, and the names of what it defines itself: its bodies are other rows' affair."""
    assert isinstance(owner.found, griffe.Class)
    constructor = owner.found.members.get("__init__")
    signature = _text(constructor)[0] if isinstance(constructor, griffe.Function) else ()
    bases = [cls.name for cls in tree.mro(owner)[0]]
    return signature, "\n".join([f"bases: {bases}", *sorted(owner.found.members)])


def _text(found: griffe.Object | None) -> Part:
    if found is None:  # from outside of these sources
        return (), "outside"
    node: Any = node_of(found)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return (), ast.unparse(node)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    decorators = [f"@{ast.unparse(one)}" for one in node.decorator_list]
    return _parameters(node.args), "\n".join([*decorators, *map(ast.unparse, body)])


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    """Return each parameter as it is written, with its annotation and default."""
    by_place = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(by_place) - len(arguments.defaults))
    defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
    named = [
        ast.unparse(one) + (f" = {ast.unparse(default)}" if default else "")
        for one, default in zip([*by_place, *arguments.kwonlyargs], defaults, strict=True)
    ]
    rest = ((arguments.vararg, "*"), (arguments.kwarg, "**"))
    return (*named, *(f"{stars}{ast.unparse(one)}" for one, stars in rest if one))
