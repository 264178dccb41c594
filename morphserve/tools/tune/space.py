"""The search space: which keys of the MorphServe YAML may move, and how far."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from morphserve.config import MorphServeConfig, parse_config, problem_lines
from morphserve.errors import ConfigError
from morphserve.shipped import SEARCH_SPACE
from morphserve.tools.tune.config_keys import Key, resolve_key
from morphserve.tools.tune.errors import TuningError
from morphserve.user_input import read_yaml, user_path

KINDS = ("threshold", "slo")
Value = bool | int | float | str | None


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Section):
    """The numbers from `low` to `high`, both included. Whole numbers where the key takes no others."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="as likely between 1 and 2 as between 10 and 20")
    step: int | float | None = Field(None, description="only low, low + step, ...; null = any number")


class Choices(_Section):
    """A list of values; null leaves the key to the policy's mode."""

    choices: Annotated[list[Value], Field(min_length=1)]


def _which(value: object) -> str:
    return "choices" if isinstance(value, dict) and "choices" in value else "range"


Spec = Annotated[Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_which)]


class SpaceFile(_Section):
    """The root of the YAML: one section for each kind of policy, each from a dotted key to where it may move."""

    version: Literal[1] = 1
    threshold: dict[str, Spec] = Field(default_factory=dict)
    slo: dict[str, Spec] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A key that may move."""

    key: Key
    spec: Range | Choices

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that must be legal by themselves."""
        return (self.spec.low, self.spec.high) if isinstance(self.spec, Range) else tuple(self.spec.choices)


@dataclass(frozen=True, slots=True)
class Space:
    """The keys that may move, and the config that everything else comes from."""

    config: MorphServeConfig
    parameters: tuple[Parameter, ...]

    def with_values(self, values: Mapping[str, Value]) -> MorphServeConfig:
        """Return the config with these values at their keys.

        Raises:
            ConfigError: they contradict each other or their bounds.
        """
        raw = as_mapping(self.config)
        for parameter in self.parameters:
            value = values[parameter.key.path]
            # 0.82, where a sampler's steps arrive at 0.8200000000000001.
            parameter.key.put(raw, float(f"{value:.12g}") if isinstance(value, float) else value)
        return parse_config(raw, source="policy of this trial")

    def document(self) -> dict[str, Any]:
        """Return plain values, to compare with another study's."""
        return {p.key.path: p.spec.model_dump(mode="json") for p in self.parameters}


def as_mapping(config: MorphServeConfig) -> dict[str, Any]:
    """Return what `parse_config` takes, without the decision log: trials must not write into it."""
    raw: dict[str, Any] = copy.deepcopy(config.model_dump(mode="json"))
    return raw | {"decision_log": None}


def load_space(path: Path, config: MorphServeConfig) -> Space:
    """Read and check the section of the config's kind of policy.

    Raises:
        TuningError: unreadable, no such section, an unknown key, or a range that is none.
    """
    file = _read(path)
    kind = config.policy.kind
    specs: Mapping[str, Range | Choices] = getattr(file, kind, {})
    if not specs:
        filled = [name for name in KINDS if getattr(file, name)]
        raise TuningError(
            f"space {path}: nothing to tune for policy.kind {kind}, only for {', '.join(filled) or 'no kind at all'}. "
            f"Add a section `{kind}:`, or give a --config of another kind."
            if kind in KINDS
            else f"space {path}: the policy of --config is of kind {kind}, which has nothing to tune. "
            f"Give one of kind {' or '.join(KINDS)}."
        )
    try:
        # Sorted: lines of the file may change places, and trials must not change with them.
        parameters = tuple(Parameter(resolve_key(key, config), specs[key]) for key in sorted(specs))
        space = Space(config, parameters)
        for parameter in parameters:
            _check_spec(parameter)
            _check_ends(parameter, space)
    except TuningError as e:
        raise TuningError(f"space {path}: {e}") from e
    return space


def _read(path: Path) -> SpaceFile:
    try:
        return SpaceFile.model_validate(read_yaml(user_path(path), "space"))
    except ConfigError as e:
        raise TuningError(str(e)) from e
    except ValidationError as e:
        lines = problem_lines(e)
        raise TuningError(
            f"space {path}: {len(lines)} problem(s):\n" + "\n".join(lines)
            + f"\nA key has {{low, high, log, step}} or {{choices}}; see {SEARCH_SPACE}."
        ) from e


def _check_spec(parameter: Parameter) -> None:
    """Refuse a range that is none, or stands on a key that takes no numbers."""
    spec, path = parameter.spec, parameter.key.path
    if isinstance(spec, Choices):
        if len({repr(choice) for choice in spec.choices}) < len(spec.choices):
            raise TuningError(f"{path}: choices {spec.choices} name one twice. Remove it.")
        return
    if parameter.key.numbers is None:
        raise TuningError(f"{path} takes no numbers, so it has no low and high. Give {{choices: [...]}}.")
    numbers = [spec.low, spec.high] + ([] if spec.step is None else [spec.step])
    if not all(math.isfinite(number) for number in numbers):
        raise TuningError(f"{path}: {numbers} must be finite numbers.")
    if parameter.key.numbers is int and not all(float(number).is_integer() for number in numbers):
        raise TuningError(f"{path}: takes whole numbers, found {numbers}. Give whole low, high and step.")
    if spec.low > spec.high:
        raise TuningError(f"{path}: low {spec.low:g} is above high {spec.high:g}. Exchange them.")
    if spec.log and (spec.low <= 0 or spec.step is not None):
        raise TuningError(f"{path}: log needs a low above 0 (it is {spec.low:g}) and no step. Leave one of them out.")
    if spec.step is not None:
        _check_step(path, spec, spec.step)


def _check_step(path: str, spec: Range, step: float) -> None:
    if step <= 0:
        raise TuningError(f"{path}: step is {step:g}, must be above 0, or left out.")
    steps = (spec.high - spec.low) / step
    if abs(steps - round(steps)) > 1e-6:
        raise TuningError(
            f"{path}: steps of {step:g} from {spec.low:g} do not reach {spec.high:g}. "
            f"Set high to {spec.low + math.floor(steps) * step:g}."
        )


def _check_ends(parameter: Parameter, space: Space) -> None:
    """Refuse an end that the key does not take; whether values go together, only a trial can tell."""
    for value in parameter.ends:
        raw = as_mapping(space.config)
        parameter.key.put(raw, value)
        try:
            parse_config(raw, source="there")
        except ConfigError as e:
            reason = str(e).splitlines()[1].strip() if len(str(e).splitlines()) > 1 else str(e)
            raise TuningError(f"{parameter.key.path}: {value!r} is out of bounds: {reason}. Move the end.") from e

