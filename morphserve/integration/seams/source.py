"""Does the seam table hold in a vLLM that cannot be imported here? Its sources are read instead: a wheel, a checkout.

The rules are those of `seams.check_seam`: parameters and attributes are there by name, own or inherited; of an
instance counts what its classes define, annotate and store on `self` in constructors. Two rules more:
a decorator keeps the signature of what it decorates, and what comes from outside of the sources is there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from morphserve.integration.seams.rows import Seam, SeamResult
from morphserve.integration.seams.tree import SourceTree, Symbol, scope_of
from morphserve.version import SUPPORTED_VLLM

_CONSTRUCTORS = ("__init__", "__post_init__")
_MAKE_CONSTRUCTORS = ("dataclass", "config")  # decorators, by the end of their name; the second is vLLM's own
_FIELD_BASES = ("NamedTuple", "Struct", "BaseModel")  # whose subclasses are built from their annotations
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def check_seam(seam: Seam, tree: SourceTree) -> SeamResult:
    """Find the target in the sources and compare its parameters and attributes."""
    found = _resolve(seam.target, tree)
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
    """One result a row."""
    return [check_seam(row, tree) for row in rows]


def check_sources_version(tree: SourceTree) -> SeamResult:
    """The vLLM of these sources is inside the supported range."""
    have = sources_version(tree)
    seam = Seam("version", "vllm:__version__", (), f"tested range {SUPPORTED_VLLM}")
    ok = have is not None and SpecifierSet(SUPPORTED_VLLM).contains(Version(have).base_version, prereleases=True)
    return SeamResult(seam, ok, f"sources of {have or 'no version'}, supported {SUPPORTED_VLLM}")


def sources_version(tree: SourceTree) -> str | None:
    """What a built vLLM says of itself; None for a checkout that was never built."""
    module = tree.module("vllm._version")
    binding = module.scope.names.get("__version__") if module else None
    value = binding.value if isinstance(binding, ast.Assign) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def attributes(symbol: Symbol, tree: SourceTree) -> tuple[set[str], set[str], list[str]]:
    """(what instances may have, what each of them has, bases outside of the sources); of a function: what it stores."""
    if isinstance(symbol.node, _FUNCTIONS) and not _decorated(symbol.node, "property"):
        return *stored(symbol.node), []
    classes, outside = tree.mro(symbol)
    may: set[str] = set()
    must: set[str] = set()
    for module, cls in classes:
        scope = scope_of(cls.body, module)
        both = {*scope.names, *scope.declared}
        may |= both
        must |= both
        for name in _CONSTRUCTORS:
            if isinstance(constructor := scope.names.get(name), _FUNCTIONS):
                some, every = stored(constructor)
                may |= some
                must |= every
    return may, must, outside


def parameters(symbol: Symbol, tree: SourceTree) -> list[str] | str:
    """Names of the parameters of a function, a method or a class; else why there are none."""
    if symbol.outside:
        return f"it comes from {symbol.module}, outside of these sources"
    if isinstance(symbol.node, _FUNCTIONS) and not _decorated(symbol.node, "property"):
        bound = symbol.of_instance or _decorated(symbol.node, "classmethod")
        return _names(symbol.node)[1 if bound and not _decorated(symbol.node, "staticmethod") else 0 :]
    if not isinstance(symbol.node, ast.ClassDef):
        return f"it is no function of {symbol.module}"
    classes, outside = tree.mro(symbol)
    from_fields = any(base.rpartition(".")[2].partition("[")[0] in _FIELD_BASES for base in outside)
    for position, (module, cls) in enumerate(classes):
        names = scope_of(cls.body, module).names
        for name in ("__new__", "__init__"):
            if isinstance(constructor := names.get(name), _FUNCTIONS):
                return _names(constructor)[1:]
        if from_fields or any(_decorated(cls, maker) for maker in _MAKE_CONSTRUCTORS):
            return [name for _, part in reversed(classes[position:]) for name in _fields(part)]
    return f"no constructor in {[cls.name for _, cls in classes]}, bases that were not read: {outside}"


def required(symbol: Symbol) -> set[str]:
    """Parameters of a function without a default: a call of ours has to give them, a wrapper to pass them on."""
    if not isinstance(symbol.node, _FUNCTIONS):
        return set()
    every = symbol.node.args
    positional = [*every.posonlyargs, *every.args]
    keywords = [arg for arg, default in zip(every.kwonlyargs, every.kw_defaults, strict=True) if default is None]
    return {arg.arg for arg in (*positional[: len(positional) - len(every.defaults)], *keywords)} - {"self", "cls"}


def stored(function: _Function) -> tuple[set[str], set[str]]:
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
    """The same of one statement."""
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
    """One of these is run. Those that end in `raise` build no instance."""
    ends = [_stored(path, me) for path in paths]
    raises = [bool(path) and isinstance(path[-1], ast.Raise) for path in paths]
    arrive = [every for (_, every), ended in zip(ends, raises, strict=True) if not ended]
    return set[str]().union(*(some for some, _ in ends)), set.intersection(*arrive) if arrive else set()


def _resolve(target: str, tree: SourceTree) -> Symbol | str:
    """What "module:a.b" stands for, or what of it is gone."""
    module, _, path = target.partition(":")
    if tree.module(module) is None:
        return f"no module {module}"
    found = Symbol(module, None)
    done = ""
    for name in path.split("."):
        inner = tree.member(found, name)
        if inner is None:
            return f"{module} has no {name}" if not done else f"{done} of {module} has no {name}"
        found, done = inner, f"{done}.{name}".lstrip(".")
    return found


def _names(function: _Function) -> list[str]:
    every = function.args
    stars = [arg for arg in (every.vararg, every.kwarg) if arg is not None]
    return [arg.arg for arg in (*every.posonlyargs, *every.args, *every.kwonlyargs, *stars)]


def _fields(cls: ast.ClassDef) -> list[str]:
    """Annotated names that a generated constructor takes."""
    return [
        part.target.id
        for part in cls.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        if "ClassVar" not in ast.unparse(part.annotation)
        if not (isinstance(part.value, ast.Call) and any(_is_no_init(word) for word in part.value.keywords))
    ]


def _is_no_init(word: ast.keyword) -> bool:
    return word.arg == "init" and isinstance(word.value, ast.Constant) and word.value.value is False


def _decorated(node: ast.ClassDef | _Function, name: str) -> bool:
    """A decorator of this name, whatever it is an attribute of and whether it is called."""
    plain = (ast.unparse(one.func if isinstance(one, ast.Call) else one) for one in node.decorator_list)
    return any(one.rpartition(".")[2].endswith(name) for one in plain)
