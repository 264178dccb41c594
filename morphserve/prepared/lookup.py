"""Which entry fits who asks, and what is said of those that do not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morphserve.config import MorphServeConfig, step_times_file
from morphserve.control import ladder_formats
from morphserve.prepared.entries import ProfileKey, StoredProfile, StoredTimes
from morphserve.prepared.place import Place
from morphserve.prepared.store import Store, newest
from morphserve.profile_ladder import read_ladder
from policies import BASE_FORMAT


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was found for settings that are served in one place.

    Attributes:
        place: where, and how.
        profile: directory; None = there is none for it, or the settings name one.
        variants: format |-> the checkpoint that the profile was measured with.
        step_times: file; None as for `profile`.
    """

    place: Place
    profile: Path | None = None
    variants: Mapping[str, str] = field(default_factory=dict)
    step_times: Path | None = None

    def fill(self, config: MorphServeConfig) -> MorphServeConfig:
        """Return the settings with what was found where they name nothing."""
        update: dict[str, Any] = {}
        if config.profile is None and self.profile is not None:
            update |= {"profile": self.profile, "variants": {**self.variants, **config.variants}}
        if config.step_times is None and self.step_times is not None:
            update["step_times"] = self.step_times
        return config.model_copy(update=update) if update else config


@dataclass(slots=True)
class Findings:
    """What was found, in words.

    Attributes:
        used: each thing that is used.
        not_used: each thing that is there and is not, with the reason.
        with_profile: False where a profile would be refused, and so nobody is told to make one.
    """

    used: list[str] = field(default_factory=list)
    not_used: list[str] = field(default_factory=list)
    with_profile: bool = True

    def say(self, logger: logging.Logger, model: str) -> None:
        """Say it: one INFO line of what is used, one WARNING of what is there and is not."""
        remedy = f"`morphserve prepare {model}`"
        if self.used:
            logger.info("morphserve: was prepared, and uses %s.", " and ".join(self.used))
        if self.not_used:
            logger.warning(
                "morphserve: not used, as it is damaged or not of this model as it is served here: %s. Run %s with "
                "the options of this server to have its own; `prepared: false` in the settings looks for none.",
                "; ".join(self.not_used), remedy,
            )  # fmt: skip
        elif not self.used and self.with_profile:
            logger.info("morphserve: nothing was prepared for this model; %s measures once what it loses.", remedy)


def find_prepared(
    config: MorphServeConfig, store: Store, place: Place, formats: Sequence[str], num_layers: int, findings: Findings
) -> Prepared:
    """Return what was prepared for these settings.

    Args:
        config: the settings as they were written.
        store: of the model.
        place: where, and how, it is served.
        formats: that a ladder has there by default.
        num_layers: of the model as it is served.
        findings: gets what there is to say, and says whether a profile is wanted.
    """
    found = Prepared(place)
    if config.profile is None and findings.with_profile:
        wanted = ProfileKey(tuple(formats), place.dtype, place.tier)
        if (profile := find_profile(store, wanted, num_layers, config.variants, findings)) is not None:
            found = Prepared(place, profile.directory, profile.variants)
    if step_times_file(config) is None and (times := find_times(store, place, findings)) is not None:
        filled = found.fill(config)
        of_layers = ladder_formats(filled.ladder, read_ladder(filled))
        if filled.profile is None and filled.ladder.steps is None:
            of_layers = tuple(formats)
        lacking = {half for fmt in of_layers for half in fmt.split("/")} - {BASE_FORMAT, *times.formats}
        if lacking:
            findings.not_used.append(f"step times {times.file} (none of {', '.join(sorted(lacking))})")
        else:
            findings.used.append(f"the step times of {times.when} ({times.file})")
            found = Prepared(place, found.profile, found.variants, times.file)
    findings.not_used += store.problems
    return found


def find_profile(
    store: Store, wanted: ProfileKey, num_layers: int, variants: Mapping[str, str], findings: Findings
) -> StoredProfile | None:
    """Return the profile to use: measured just so, else one whose figures are upper bounds; one's own before others.

    Args:
        store: of the model.
        wanted: the formats that run, and in what they would be measured; `sources` do not count.
        num_layers: of the model as it is served.
        variants: format |-> checkpoint that the settings name.
        findings: gets what there is to say.
    """
    fitting, other = [], []
    for each in store.profiles():
        differences = each.differences(wanted) + _unfit(each, num_layers, variants)
        if differences:
            other.append(f"profile {each.directory} ({', '.join(differences)})")
        else:
            fitting.append(each)
    exact = [each for each in fitting if (each.key.dtype, each.key.tier) == (wanted.dtype, wanted.tier)]
    own = [each for each in exact or fitting if each.directory.parent == store.directory]
    chosen = newest(own or exact or fitting)
    if chosen is None:
        findings.not_used += other
        return None
    key = chosen.key
    bound = "" if exact else f", whose KL is an upper bound here: it was measured in {key.dtype} on tier {key.tier}"
    findings.used.append(f"the profile of {chosen.when} ({chosen.directory}{bound})")
    return chosen


def find_times(store: Store, place: Place, findings: Findings) -> StoredTimes | None:
    """Return the step times to use: those of this very place."""
    times = store.times()
    found = newest([each for each in times if each.place == place])
    if found is None and times:
        nearest = min(times, key=lambda each: len(place.differences(each.place)))
        findings.not_used.append(f"step times {nearest.file} ({', '.join(place.differences(nearest.place))})")
    return found


def _unfit(profile: StoredProfile, num_layers: int, variants: Mapping[str, str]) -> list[str]:
    named = [fmt for fmt in profile.key.formats if fmt in variants]
    found = [f"measured without {fmt} from {variants[fmt]}" for fmt in named]
    if profile.num_layers != num_layers:
        found.append(f"{profile.num_layers} layers instead of {num_layers}")
    return found + [f"its {path} is gone" for path in profile.variants.values() if not Path(path).is_dir()]
