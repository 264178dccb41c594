"""A dotted key such as `policy.degrade_above` or `ladder.steps.1.layers_per_level`: what is there, how to set it."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from morphserve.config import KVConfig, LadderConfig, MorphServeConfig, TransitionConfig
from morphserve.tools.tune.errors import TuningError
from policies import SloConfig, ThresholdConfig

_SECTIONS: dict[str, type[BaseModel]] = {"ladder": LadderConfig, "kv": KVConfig, "transition": TransitionConfig}
_POLICIES: dict[str, type[BaseModel]] = {"threshold": ThresholdConfig, "slo": SloConfig}
# What is measured or chooses the study itself, and so is not for a search to move.
_FIXED = ("policy.kind", "ladder.expected_kl", "kv.base_num_blocks", "kv.max_num_blocks")


@dataclass(frozen=True, slots=True)
class Key:
    """A place in the config that exists."""

    path: str
    numbers: type[int] | type[float] | None  # which numbers it takes

    def put(self, raw: dict[str, Any], value: object) -> None:
        """Set it in a config's mapping."""
        *parents, last = self.path.split(".")
        here: Any = raw
        for part in parents:
            here = here[int(part)] if isinstance(here, list) else here[part]
        if isinstance(here, list):
            here[int(last)] = value
        else:
            here[last] = value


def resolve_key(path: str, config: MorphServeConfig) -> Key:
    """Find the key in this config.

    Raises:
        TuningError: there is none, or it is not for a search; the message lists its neighbours.
    """
    root, *rest = path.split(".")
    kind = config.policy.kind
    model = _POLICIES[kind] if root == "policy" else _SECTIONS.get(root)
    if model is None or not rest:
        raise TuningError(
            f"{path!r}: a key begins with policy., {'., '.join(_SECTIONS)}. and goes on with a name, "
            "such as policy.max_level."
        )
    if any(path == fixed or path.startswith(fixed + ".") for fixed in _FIXED):
        raise TuningError(f"{path} belongs to the machine or the study, not to the search. Set it in --config.")
    annotation = _field(model, rest[0], path, kind)
    at: object = getattr(getattr(config, root), rest[0])
    for part in rest[1:]:
        annotation, at = _inside(annotation, at, part, path, kind)
    if _model_in(annotation) is not None:
        raise TuningError(f"{path} holds several keys. Go on to one of them, such as {path}.0.layers_per_level.")
    return Key(path, _numbers(annotation))


def _field(model: type[BaseModel], name: str, path: str, kind: str) -> Any:
    if name in model.model_fields:
        return model.model_fields[name].annotation
    names = ", ".join(n for n in model.model_fields if n != "kind")
    others = _POLICIES.items() if path == f"policy.{name}" else ()
    owners = [other for other, fields in others if other != kind and name in fields.model_fields]
    if owners:
        raise TuningError(
            f"{path} is a key of policy.kind {owners[0]}, and --config has kind {kind}, whose keys are {names}. "
            f"Move it to the section `{owners[0]}:`."
        )
    raise TuningError(f"{path} is not a key of the config; there are {names}. Use one of these.")


def _inside(annotation: Any, at: object, part: str, path: str, kind: str) -> tuple[Any, object]:
    """Go one part further: an entry of a list, then a key of that entry."""
    if isinstance(at, BaseModel):
        return _field(type(at), part, path, kind), getattr(at, part, None)
    if not isinstance(at, list | tuple) or not part.isdigit() or int(part) >= len(at):
        there = f"a list of {len(at)}, counted from 0" if isinstance(at, list | tuple) else f"{at!r}"
        raise TuningError(f"{path}: the config has no entry {part!r} there, it has {there}. List it in --config.")
    inner = _model_in(annotation)
    return (inner if inner is not None else annotation), at[int(part)]


def _leaves(annotation: Any) -> list[Any]:
    args = typing.get_args(annotation)
    if not args or typing.get_origin(annotation) is typing.Literal:
        return [annotation]
    return [leaf for arg in args for leaf in _leaves(arg)]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    found = [leaf for leaf in _leaves(annotation) if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
    return found[0] if found else None


def _numbers(annotation: Any) -> type[int] | type[float] | None:
    leaves = _leaves(annotation)
    return float if float in leaves else int if int in leaves else None
