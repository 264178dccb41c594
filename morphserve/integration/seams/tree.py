"""What the modules of a source tree define, without importing any of them.

griffe reads a module when a name leads there: a check needs a few of vLLM's thousands. What lies outside of the sources
(torch, the standard library) is known to be there, and nothing more.
"""

from __future__ import annotations

import ast
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import griffe

from morphserve.errors import SeamError

_MAX_ALIASES = 32  # `a = b`, `from x import a`: longer chains lead in a circle


@dataclass(frozen=True, slots=True)
class Symbol:
    """What a name stands for, and where that was written."""

    path: str
    found: griffe.Object | None  # None: outside of the sources
    of_instance: bool = False  # found through an instance: a method without its first parameter


class _Corrections(griffe.Extension):
    """What we need and griffe leaves out or mixes up: syntax trees, whose member it is, what is there at run time."""

    def on_instance(self, *, node: Any, obj: griffe.Object, **_: Any) -> None:
        obj.extra["seams"]["node"] = node
        obj.runtime = _at_run_time(node)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Take out what only the constructor stores or annotates: `stored` says on which paths."""
        for name, one in list(cls.members.items()):
            if isinstance(one, griffe.Attribute) and "class-attribute" not in one.labels and _in_function(node_of(one)):
                del cls.members[name]

    def on_alias_instance(self, *, node: Any, alias: griffe.Alias, **_: Any) -> None:
        alias.runtime = _at_run_time(node)


class SourceTree:
    """Python sources below a directory, or in a wheel. Each module is read and parsed once."""

    def __init__(self, path: Path, package: str = "vllm") -> None:
        """Take `path`, a wheel or a directory with `package` in it. What lies beside the package is not read.

        Raises:
            SeamError: it is neither.
        """
        self._path, self._package = path, package
        self._zip: zipfile.ZipFile | None = None
        self._files: frozenset[str] = frozenset()
        self._modules: dict[str, griffe.Module | None] = {}
        self._extensions = griffe.load_extensions(_Corrections)
        if path.is_file() and zipfile.is_zipfile(path):
            self._zip = zipfile.ZipFile(path)
            self._files = frozenset(self._zip.namelist())
        if not self._has(f"{package}/__init__.py"):
            raise SeamError(
                f"{path} holds no {package}/__init__.py. Give a wheel, or a directory that has {package}/ in it."
            )

    def module(self, name: str) -> griffe.Module | None:
        """Return a module, None if there is no such file. A package without `__init__.py` counts as none."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def find(self, path: str, _depth: int = 0) -> Symbol | None:
        """Return what a dotted path stands for, where it was first written; None if there is no such name."""
        if path.partition(".")[0] != self._package:
            return Symbol(path, None)
        if _depth > _MAX_ALIASES:
            return None
        parent, _, name = path.rpartition(".")
        owner = self._module_symbol(parent) or (self.find(parent, _depth + 1) if parent else None)
        found = self.member(owner, name, _depth + 1) if owner else None
        return found or self._module_symbol(path)

    def member(self, owner: Symbol, name: str, _depth: int = 0) -> Symbol | None:
        """Attribute `name` of a module, a class or an annotated instance; None if none is known."""
        if isinstance(owner.found, griffe.Attribute):
            declared = self._expression(owner.found.annotation)
            found = self.member(declared, name, _depth) if declared and _is_class(declared) else None
            return found and replace(found, of_instance=True)
        if isinstance(owner.found, griffe.Module):
            late = "__getattr__" in owner.found.members  # loads at run time what the type checker is told
            one = owner.found.members.get(name)
            if one is not None and (late or (one.runtime and _is_bound(one))):
                return self._follow(one, _depth)
            for star in owner.found.members.values() if not name.startswith("_") else ():
                if star.is_alias and star.wildcard and (found := self.find(f"{star.target_path}.{name}", _depth)):
                    return found
        for cls in self.mro(owner)[0]:
            if (one := cls.members.get(name)) is not None and _is_bound(one):
                return self._follow(one, _depth)
        return None

    def mro(self, symbol: Symbol) -> tuple[list[griffe.Class], list[str]]:
        """Return a class and its bases, depth first, each once; and the bases that lie outside."""
        found: list[griffe.Class] = []
        outside: list[str] = []
        waiting = [symbol.found]
        while waiting:
            one = waiting.pop(0)
            if not isinstance(one, griffe.Class) or one in found:
                continue
            found.append(one)
            bases = [(str(base), self._expression(base)) for base in one.bases]
            outside += [said for said, base in bases if base is None or not _is_class(base)]
            waiting = [base.found for _, base in bases if base is not None] + waiting
        return found, outside

    def _module_symbol(self, path: str) -> Symbol | None:
        module = self.module(path)
        return Symbol(path, module) if module else None

    def _follow(self, one: griffe.Object | griffe.Alias, depth: int) -> Symbol | None:
        if isinstance(one, griffe.Alias):
            return self.find(one.target_path, depth)
        if isinstance(one, griffe.Attribute) and isinstance(one.value, griffe.ExprName):
            path = one.value.canonical_path
            return ("." in path and self.find(path, depth)) or Symbol(one.path, one)
        return Symbol(one.path, one)

    def _expression(self, said: str | griffe.Expr | None) -> Symbol | None:
        """Return what `Name`, `a.Name`, `Name[T]`, `"Name"` or `Name | None` stands for."""
        while isinstance(said, griffe.ExprBinOp | griffe.ExprSubscript):
            said = said.left
        return self.find(said.canonical_path) if isinstance(said, griffe.Expr) else None

    def _has(self, file: str) -> bool:
        return file in self._files if self._zip else (self._path / file).is_file()

    def _parse(self, name: str) -> griffe.Module | None:
        path = name.replace(".", "/")
        for file in (f"{path}/__init__.py", f"{path}.py"):
            if self._has(file):
                text = self._zip.read(file) if self._zip else (self._path / file).read_bytes()
                parent = self.module(name.rpartition(".")[0]) if "." in name else None
                return griffe.visit(
                    name.rpartition(".")[2], Path(file), text.decode(), extensions=self._extensions, parent=parent
                )
        return None


def node_of(found: griffe.Object) -> Any:
    """Return the syntax tree that a module, class, function or attribute was read from."""
    return found.extra["seams"]["node"]


def _is_class(symbol: Symbol) -> bool:
    return isinstance(symbol.found, griffe.Class)


def _is_bound(one: griffe.Object | griffe.Alias) -> bool:
    """Not `name: type` without a value."""
    return not isinstance(one, griffe.Attribute) or one.value is not None or "property" in one.labels


def _in_function(node: Any) -> bool:
    """Return whether a statement of a class body stands in one of its functions."""
    while not isinstance(node := node.parent, ast.FunctionDef | ast.ClassDef):
        pass
    return isinstance(node, ast.FunctionDef)


def _at_run_time(node: Any) -> bool:
    """Return whether a statement is run: griffe takes the `else` of TYPE_CHECKING for a part of it."""
    while (parent := getattr(node, "parent", None)) is not None:
        if isinstance(parent, ast.If) and ast.unparse(parent.test).endswith("TYPE_CHECKING"):
            return node not in parent.body
        node = parent
    return True
