"""What an entry of the store is, and what it must share with who asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from morphserve.prepared.place import Place

# The coarsest base there is: fp16 and fp32 round less, so what was measured beside bf16 is an upper bound for them.
_COARSEST = "bfloat16"


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What a profile's figures depend on beside the weights."""

    formats: tuple[str, ...]  # that it prices
    dtype: str  # of the base when its levels were measured
    tier: str  # of the CPU then; empty on a GPU
    sources: Mapping[str, str] = field(default_factory=dict)  # format |-> how its checkpoint was made

    @property
    def name(self) -> str:
        """Of its entry."""
        return _digest(asdict(self))


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile in the store."""

    directory: Path
    key: ProfileKey
    made: Mapping[str, Any]
    num_layers: int

    @property
    def when(self) -> str:
        """The moment at which it was made."""
        return str(self.made.get("when", "?"))

    @property
    def variants(self) -> dict[str, str]:
        """Format |-> checkpoint that it was measured with."""
        return {fmt: str(self.directory.parent / f"{fmt}-{how}") for fmt, how in self.key.sources.items()}

    def differences(self, wanted: ProfileKey) -> list[str]:
        """Return what makes its figures another's; empty = they hold, or are upper bounds (see `is_bound`)."""
        found = []
        if self.key.formats != wanted.formats:
            found.append(f"formats {', '.join(self.key.formats)} instead of {', '.join(wanted.formats)}")
        if bool(self.key.tier) != bool(wanted.tier):
            found.append(f"made on {'a CPU' if self.key.tier else 'a GPU'}")
        elif (self.key.dtype, self.key.tier) != (wanted.dtype, wanted.tier) and not self.is_bound:
            mine, theirs = (f"{key.dtype}{_on(key.tier)}" for key in (self.key, wanted))
            found.append(f"measured in {mine} instead of {theirs}")
        return found

    @property
    def is_bound(self) -> bool:
        """Whether no CPU loses more than its figures say: the base was bf16, and all activations had 8 bits.

        Kernels of other tiers round activations to 16-bit steps or not at all, and read the same weights.
        """
        return bool(self.made.get("int8_activations")) and self.key.dtype == _COARSEST and bool(self.key.tier)


@dataclass(frozen=True, slots=True)
class TimesKey:
    """What step times depend on beside the weights."""

    place: Place

    @property
    def name(self) -> str:
        """Of its entry."""
        return _digest(asdict(self.place))


@dataclass(frozen=True, slots=True)
class StoredTimes:
    """A calibration in the store."""

    file: Path
    place: Place
    formats: tuple[str, ...]  # that were timed, full precision included
    when: str


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _on(tier: str) -> str:
    return f" on tier {tier}" if tier else ""
