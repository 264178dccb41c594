"""How vLLM is patched: by a row of the table, on a class, a module or one object. `patches` lists, `undo` restores.

What a patch replaced is kept on what it was put on, so an engine that ends takes its patches along.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from morphserve.integration.seams.check import ORIGINAL, resolve
from morphserve.integration.seams.rows import Seam

_MAKER = "_morphserve_maker"  # of a wrapper: what made it
_RECORD = "_morphserve_patches"  # of whatever is patched: its patches, oldest first
_ABSENT = object()
_OWNERS: dict[int, weakref.ref[Any]] = {}  # id |-> what has a record


@dataclass(eq=False, slots=True)
class Patch:
    """One attribute of a class, a module or an object that is ours for now."""

    row: Seam
    owner: Any
    name: str
    ours: Any
    before: Any  # _ABSENT = inherited, or not there at all

    @property
    def in_place(self) -> bool:
        """Whether the attribute is still what we made it."""
        return vars(self.owner).get(self.name, _ABSENT) is self.ours

    def undo(self) -> None:
        """Put back what was there. What somebody put over it stays, and calls ours. Re-entrant."""
        record = vars(self.owner).get(_RECORD, [])
        if self not in record:
            return
        record.remove(self)
        if not record:
            delattr(self.owner, _RECORD)
            del _OWNERS[id(self.owner)]
        if not self.in_place:
            return
        if self.before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


def wrap(
    row: Seam, make: Callable[[Callable[..., Any]], Any], on: Any = None, name: str | None = None
) -> Patch | None:
    """Replace a function of vLLM by `make(original)`, once for each `make`.

    Args:
        row: of the seam tables, as its constant.
        make: returns the wrapper (or a descriptor of it), which calls the original.
        on: one object to patch, and to leave all others of its class as they are.
        name: one of the row's attributes; without it, the function that the row's target is.

    Returns:
        The patch; None if it was there already.
    """
    owner, name = _place(row, on, name)
    current = wrapper = getattr(owner, name)
    while getattr(wrapper, ORIGINAL, None) is not None:
        if getattr(wrapper, _MAKER) is make:
            return None
        wrapper = getattr(wrapper, ORIGINAL)
    replacement = make(current)
    # A static or class method is put there as the descriptor it is, and marked on what that holds.
    function = getattr(replacement, "__func__", replacement)
    setattr(function, ORIGINAL, current)
    setattr(function, _MAKER, make)
    return _install(row, owner, name, replacement)


def put(row: Seam, name: str, value: Any, on: Any = None) -> Patch:
    """Set an attribute of vLLM's. Put again, it is still one patch, which knows what was there before the first.

    Args:
        row: of the seam tables, as its constant.
        name: of the attribute.
        value: what it becomes.
        on: one object; without it, the class or module that the row's target is.
    """
    owner, _ = _place(row, on, name)
    for patch in vars(owner).get(_RECORD, []):
        if (patch.row, patch.name) == (row, name) and patch.in_place:
            patch.ours = value
            setattr(owner, name, value)
            return patch
    return _install(row, owner, name, value)


def patches() -> list[Patch]:
    """Return all that are there now, those of one owner oldest first."""
    owners = [owner for reference in list(_OWNERS.values()) if (owner := reference()) is not None]
    return [patch for owner in owners for patch in vars(owner)[_RECORD]]


def undo() -> None:
    """Put back everything that `wrap` and `put` have replaced, last one first."""
    for patch in reversed(patches()):
        patch.undo()


def _install(row: Seam, owner: Any, name: str, value: Any) -> Patch:
    patch = Patch(row, owner, name, value, vars(owner).get(name, _ABSENT))
    setattr(owner, _RECORD, [*vars(owner).get(_RECORD, []), patch])
    key = id(owner)
    _OWNERS[key] = weakref.ref(owner, lambda _: _OWNERS.pop(key, None))
    setattr(owner, name, value)
    return patch


def _place(row: Seam, on: Any, name: str | None) -> tuple[Any, str]:
    """Return the (owner, attribute) that a row means."""
    owner, last, value = resolve(row.target)
    if on is not None:
        return on, name or last
    return (value, name) if name else (owner, last)
