"""Does the seam table hold in a vLLM that cannot be imported here? Its sources are read instead: a wheel, a checkout.

The rules are those of `seams.check_seam`: parameters and attributes are there by name, own or inherited; of an
instance counts what its classes define, annotate and store on `self` in constructors. Two rules more:
a decorator keeps the signature of what it decorates, and what comes from outside of the sources is there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

import griffe

from morphserve.integration.seams.check import SeamResult, judge_version
from morphserve.integration.seams.rows import Seam
from morphserve.integration.seams.tree import SourceTree, Symbol, node_of

_CONSTRUCTORS = ("__init__", "__post_init__")
_MAKE_CONSTRUCTORS = ("dataclass", "config")  # decorators, by the end of their name; the second is vLLM's own
_FIELD_BASES = ("NamedTuple", "Struct", "BaseModel")  # whose subclasses are built from their annotations


def check_seam(seam: Seam, tree: SourceTree) -> SeamResult:
    """Find the target in the sources and compare its parameters and attributes."""
    found = locate(seam.target, tree)
    if isinstance(found, str):
        return SeamResult(seam, False, found)
    may, must, unread = attributes(found, tree)
    if gone := sorted(set(seam.attributes) - may):
        bases = f"; bases that were not read: {unread}" if unread else ""
        return SeamResult(seam, False, f"instances have no {gone}{bases}")
    notes = [f"only on some paths: {some}"] if (some := sorted(set(seam.attributes) - must)) else []
    if seam.params:
        have = parameters(found, tree)
        if isinstance(have, str):
            return SeamResult(seam, False, f"no signature: {have}")
        if missing := [p for p in seam.params if p not in have]:
            return SeamResult(seam, False, f"parameters {missing} are gone; it has {have}")
        unlisted = [p for p in have if p in required(found) and p not in seam.params]
        notes = ["parameters match", *([f"also needs {unlisted}"] if unlisted else []), *notes]
    return SeamResult(seam, True, ", ".join(["present", *notes]))


def check_sources(rows: Iterable[Seam], tree: SourceTree) -> list[SeamResult]:
    """Return one result a row."""
    return [check_seam(row, tree) for row in rows]


def check_sources_version(tree: SourceTree) -> SeamResult:
    """Check that the vLLM of these sources is inside the supported range."""
    return judge_version(sources_version(tree), "sources of")


def sources_version(tree: SourceTree) -> str | None:
    """Return the version that a built vLLM says it has; None for a checkout that was never built."""
    module = tree.module("vllm._version")
    version = module.members.get("__version__") if module else None
    return ast.literal_eval(str(version.value)) if isinstance(version, griffe.Attribute) else None


def attributes(symbol: Symbol, tree: SourceTree) -> tuple[set[str], set[str], list[str]]:
    """Return (what instances may have, what each has, bases outside of the sources); of a function: what it stores."""
    if isinstance(symbol.found, griffe.Function):
        return *stored(node_of(symbol.found)), []
    classes, outside = tree.mro(symbol)
    may = {name for cls in classes for name in cls.members}
    must = set(may)
    for cls in classes:
        for name in _CONSTRUCTORS:
            if isinstance(constructor := cls.members.get(name), griffe.Function):
                some, every = stored(node_of(constructor))
                may |= some
                must |= every
    return may, must, outside


def parameters(symbol: Symbol, tree: SourceTree) -> list[str] | str:
    """Names of the parameters of a function, a method or a class; else why there are none."""
    found = symbol.found
    if found is None:
        return f"it comes from {symbol.path}, outside of these sources"
    if isinstance(found, griffe.Function):
        bound = symbol.of_instance or "classmethod" in found.labels
        return _names(found)[1 if bound and "staticmethod" not in found.labels else 0 :]
    if not isinstance(found, griffe.Class):
        return f"it is no function of {found.module.path}"
    classes, outside = tree.mro(symbol)
    from_fields = any(base.rpartition(".")[2].partition("[")[0] in _FIELD_BASES for base in outside)
    for position, cls in enumerate(classes):
        for name in ("__new__", "__init__"):
            if isinstance(constructor := cls.members.get(name), griffe.Function):
                return _names(constructor)[1:]
        if from_fields or any(one.callable_path.endswith(_MAKE_CONSTRUCTORS) for one in cls.decorators):
            return [name for part in reversed(classes[position:]) for name in _fields(part)]
    return f"no constructor in {[cls.name for cls in classes]}, bases that were not read: {outside}"


def required(symbol: Symbol) -> set[str]:
    """Parameters of a function without a default: a call of ours has to give them, a wrapper to pass them on."""
    if not isinstance(symbol.found, griffe.Function):
        return set()
    return {one.name for one in symbol.found.parameters if one.required} - {"self", "cls"}


def stored(function: ast.FunctionDef) -> tuple[set[str], set[str]]:
    """Attributes of its first argument that a function stores: (on some path, on every path to its end).

    What functions inside of it store does not count.
    """
    first = [*function.args.posonlyargs, *function.args.args][:1]
    return _stored(function.body, first[0].arg) if first else (set(), set())


def _stored(body: list[ast.stmt], me: str) -> tuple[set[str], set[str]]:
    may: set[str] = set()
    must: set[str] = set()
    all_come_here = True  # no `return` before this statement
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        some, every = _stored_by(statement, me)
        may |= some
        must |= every if all_come_here else set()
        all_come_here &= not any(isinstance(node, ast.Return) for node in ast.walk(statement))
    return may, must


def _stored_by(statement: ast.stmt, me: str) -> tuple[set[str], set[str]]:
    """Return the same of one statement."""
    if isinstance(statement, ast.With | ast.AsyncWith):
        return _stored(statement.body, me)
    if isinstance(statement, ast.For | ast.While | ast.AsyncFor):
        return _stored(statement.body + statement.orelse, me)[0], set()
    if isinstance(statement, ast.If):
        return _either([statement.body, statement.orelse], me)
    if isinstance(statement, ast.Match):
        return _either([*(case.body for case in statement.cases), []], me)
    if isinstance(statement, ast.Try):
        may, must = _either([statement.body + statement.orelse, *(h.body for h in statement.handlers)], me)
        last = _stored(statement.finalbody, me)
        return may | last[0], must | last[1]
    if isinstance(statement, ast.AnnAssign) and statement.value is None:
        return set(), set()
    found = {
        node.attr
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == me
    }
    return found, found


def _either(paths: list[list[ast.stmt]], me: str) -> tuple[set[str], set[str]]:
    """Join branches of which one is run. Those that end in `raise` build no instance."""
    ends = [_stored(path, me) for path in paths]
    raises = [bool(path) and isinstance(path[-1], ast.Raise) for path in paths]
    arrive = [every for (_, every), ended in zip(ends, raises, strict=True) if not ended]
    return set[str]().union(*(some for some, _ in ends)), set.intersection(*arrive) if arrive else set()


def locate(target: str, tree: SourceTree) -> Symbol | str:
    """Return what "module:a.b" stands for, or what of it is gone."""
    name, _, path = target.partition(":")
    if (module := tree.module(name)) is None:
        return f"no module {name}"
    found, done = Symbol(name, module), ""
    for part in path.split("."):
        inner = tree.member(found, part)
        if inner is None:
            return f"{name} has no {part}" if not done else f"{done} of {name} has no {part}"
        found, done = inner, f"{done}.{part}".lstrip(".")
    return found


def _names(function: griffe.Function) -> list[str]:
    return [one.name for one in function.parameters]


def _fields(cls: griffe.Class) -> list[str]:
    """Annotated names that a generated constructor takes."""
    return [
        name
        for name, one in cls.members.items()
        if isinstance(one, griffe.Attribute) and one.annotation is not None
        if "instance-attribute" in one.labels and "init=False" not in str(one.value).replace(" ", "")
    ]
