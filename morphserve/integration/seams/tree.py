"""What the modules of a source tree define, without importing any of them.

Follows `from x import y`, `import x as y`, `name = other`, base classes and annotations as far as the sources go.
What lies outside of them (torch, the standard library) is known to be there, and nothing more.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from morphserve.errors import SeamError

_MAX_ALIASES = 32  # `a = b`, `from x import a`: longer chains lead in a circle


@dataclass(frozen=True, slots=True)
class Import:
    """`import module`, or `from module import name`; relative ones are resolved."""

    module: str
    name: str | None = None


Binding = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign | Import


@dataclass(slots=True)
class Scope:
    """What the body of a module or a class binds."""

    names: dict[str, Binding] = field(default_factory=dict)
    declared: dict[str, ast.AnnAssign] = field(default_factory=dict)  # `name: type` without a value
    typing: dict[str, Binding] = field(default_factory=dict)  # only under TYPE_CHECKING
    stars: list[str] = field(default_factory=list)  # modules of `from module import *`


@dataclass(frozen=True, slots=True)
class Module:
    """One file."""

    name: str
    scope: Scope


@dataclass(frozen=True, slots=True)
class Symbol:
    """What a name stands for, and where that was written. `node` None = the module itself, or, outside, not read."""

    module: str
    node: Binding | None
    outside: bool = False
    of_instance: bool = False  # found through an instance: a method without its first parameter


class SourceTree:
    """Python sources below a directory, or in a wheel. Each module is read and parsed once."""

    def __init__(self, path: Path, package: str = "vllm") -> None:
        """`path`: a wheel, or a directory with `package` in it. What lies beside the package is not read.

        Raises:
            SeamError: it is neither.
        """
        self._path, self._package = path, package
        self._zip: zipfile.ZipFile | None = None
        self._files: frozenset[str] = frozenset()
        self._modules: dict[str, Module | None] = {}
        if path.is_file() and zipfile.is_zipfile(path):
            self._zip = zipfile.ZipFile(path)
            self._files = frozenset(self._zip.namelist())
        if not self._has(f"{package}/__init__.py"):
            raise SeamError(
                f"{path} holds no {package}/__init__.py. Give a wheel, or a directory that has {package}/ in it."
            )

    def module(self, name: str) -> Module | None:
        """None if there is no such file. A package without `__init__.py` counts as none."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def find(self, module: str, name: str, _depth: int = 0) -> Symbol | None:
        """What `name` means in a module, where it was first written; None if the module has no such name."""
        source = self.module(module)
        if source is None or _depth > _MAX_ALIASES:
            return None
        scope = source.scope
        binding = scope.names.get(name)
        if binding is None and "__getattr__" in scope.names:  # loads at run time what the type checker is told
            binding = scope.typing.get(name)
        if binding is not None:
            return self._follow(module, binding, _depth + 1)
        for star in scope.stars if not name.startswith("_") else ():
            if found := self.find(star, name, _depth + 1):
                return found
        return None

    def member(self, owner: Symbol, name: str) -> Symbol | None:
        """Attribute `name` of a module, a class or an annotated instance; None if none is known."""
        if owner.outside:
            return None
        if owner.node is None:
            return self.find(owner.module, name)
        instance = isinstance(owner.node, ast.AnnAssign)
        if isinstance(owner.node, ast.AnnAssign):
            declared = self._expression(owner.module, owner.node.annotation)
            if declared is None or not isinstance(declared.node, ast.ClassDef):
                return None
            owner = declared
        for module, cls in self.mro(owner)[0]:
            scope = scope_of(cls.body, module)
            if name in scope.names:
                found = self._follow(module, scope.names[name], 0)
                return found and Symbol(found.module, found.node, found.outside, of_instance=instance)
        return None

    def mro(self, symbol: Symbol) -> tuple[list[tuple[str, ast.ClassDef]], list[str]]:
        """(module, class) of a class and its bases, depth first, each once; and the bases that lie outside."""
        found: list[tuple[str, ast.ClassDef]] = []
        outside: list[str] = []
        waiting = [symbol]
        while waiting:
            one = waiting.pop(0)
            if not isinstance(one.node, ast.ClassDef) or (one.module, one.node) in found:
                continue
            found.append((one.module, one.node))
            bases = []
            for expression in one.node.bases:
                base = self._expression(one.module, expression)
                if base is None or not isinstance(base.node, ast.ClassDef):
                    outside.append(ast.unparse(expression))
                else:
                    bases.append(base)
            waiting = bases + waiting
        return found, outside

    def _follow(self, module: str, binding: Binding, depth: int) -> Symbol | None:
        if isinstance(binding, Import):
            if binding.module.partition(".")[0] != self._package:
                return Symbol(binding.module, None, outside=True)
            if binding.name is None:
                return Symbol(binding.module, None) if self.module(binding.module) else None
            found = self.find(binding.module, binding.name, depth)
            inner = f"{binding.module}.{binding.name}"  # `from . import x` in the package that x is a module of
            return found or (Symbol(inner, None) if self.module(inner) else None)
        if isinstance(binding, ast.Assign) and isinstance(binding.value, ast.Name):
            return self.find(module, binding.value.id, depth) or Symbol(module, binding)
        return Symbol(module, binding)

    def _expression(self, module: str, node: ast.expr) -> Symbol | None:
        """What `Name`, `a.Name`, `Name[T]`, `"Name"` or `Name | None` in a module stands for."""
        if isinstance(node, ast.Name):
            return self.find(module, node.id) or self._typed(module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self._expression(module, node.value)
            return self.member(owner, node.attr) if owner else None
        if isinstance(node, ast.Subscript):
            return self._expression(module, node.value)
        if isinstance(node, ast.BinOp):
            return self._expression(module, node.left)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._expression(module, ast.parse(node.value, mode="eval").body)
        return None

    def _typed(self, module: str, name: str) -> Symbol | None:
        source = self.module(module)
        binding = source.scope.typing.get(name) if source else None
        return self._follow(module, binding, 0) if binding is not None else None

    def _has(self, file: str) -> bool:
        return file in self._files if self._zip else (self._path / file).is_file()

    def _parse(self, name: str) -> Module | None:
        if name.partition(".")[0] != self._package:
            return None
        path = name.replace(".", "/")
        for file, package in ((f"{path}/__init__.py", name), (f"{path}.py", name.rpartition(".")[0])):
            if self._has(file):
                text = self._zip.read(file) if self._zip else (self._path / file).read_bytes()
                return Module(name, scope_of(ast.parse(text, filename=file).body, package))
        return None


def scope_of(body: Iterable[ast.stmt], package: str) -> Scope:
    """What statements bind. Of two that bind one name, the later one counts, unless only it stands in a branch."""
    scope = Scope()
    _bind(body, package, scope, sure=True, typing=False)
    return scope


def _bind(body: Iterable[ast.stmt], package: str, scope: Scope, *, sure: bool, typing: bool) -> None:
    for statement in body:
        for name, binding in _bindings(statement, package):
            if typing:
                scope.typing[name] = binding
            elif isinstance(binding, ast.AnnAssign) and binding.value is None:
                scope.declared[name] = binding
            elif sure or name not in scope.names:
                scope.names[name] = binding
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*" and not typing:
            scope.stars.append(_absolute(statement, package))
        elif isinstance(statement, ast.If):
            only_typing = ast.unparse(statement.test).endswith("TYPE_CHECKING")
            negated = only_typing and isinstance(statement.test, ast.UnaryOp)
            if only_typing:
                _bind(statement.body, package, scope, sure=sure, typing=typing or not negated)
                _bind(statement.orelse, package, scope, sure=sure, typing=typing or negated)
            else:
                _bind(statement.body + statement.orelse, package, scope, sure=False, typing=typing)
        elif isinstance(statement, ast.Try):
            _bind(statement.body, package, scope, sure=sure, typing=typing)
            for handler in statement.handlers:
                _bind(handler.body, package, scope, sure=False, typing=typing)
            _bind(statement.orelse + statement.finalbody, package, scope, sure=sure, typing=typing)
        elif isinstance(statement, ast.With):
            _bind(statement.body, package, scope, sure=sure, typing=typing)
        elif isinstance(statement, ast.For | ast.While):
            _bind(statement.body + statement.orelse, package, scope, sure=False, typing=typing)


def _bindings(statement: ast.stmt, package: str) -> Iterator[tuple[str, Binding]]:
    """(name, what it is bound to) of one simple statement, definition or import."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield statement.name, statement
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            whole = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or whole, Import(whole)
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            if alias.name != "*":
                yield alias.asname or alias.name, Import(_absolute(statement, package), alias.name)
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id, statement
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id, statement


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    parents = package.split(".")[: len(package.split(".")) + 1 - statement.level] if statement.level else []
    return ".".join([*parents, *filter(None, [statement.module])])
