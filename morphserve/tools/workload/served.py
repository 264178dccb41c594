"""What a server computed at each token of its answers: the most probable tokens there, and the level it was at.

`morphserve replay --top-logprobs K` records it beside each run, `morphserve served-kl` compares it with the model at
full precision.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from morphserve.files import replacing
from morphserve.tools.workload.errors import ReplayError
from morphserve.tools.workload.outcome import Outcome

ANSWERS_FILE = "top_logprobs.npz"  # in the directory of a run
UNKNOWN = -1  # the level of a server that tells none; the id of a token that is not there
_NEVER = -np.inf
# What numpy raises at a file that is cut, changed, or something else.
_DAMAGE = (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """One answer. `top_*` have a row for each token: what was most probable there, whether it was taken or not."""

    prompt: NDArray[np.int32]  # ids
    tokens: NDArray[np.int32]  # ids
    top_ids: NDArray[np.int32]  # [tokens, K], UNKNOWN where there are fewer
    top_logprobs: NDArray[np.float32]  # [tokens, K], nats
    levels: NDArray[np.int16]  # at which each token was computed, or UNKNOWN


def save_answers(directory: Path, prompts: Sequence[Sequence[int]], outcomes: Sequence[Outcome]) -> None:
    """Write the whole answers that were recorded into the directory of their run; those of a run before go."""
    recorded = [
        (list(prompts[o.index]), o)
        for o in outcomes
        if o.ok and o.top_logprobs and len(o.top_logprobs) == len(o.token_ids)
    ]
    if not recorded:
        (directory / ANSWERS_FILE).unlink(missing_ok=True)
        return
    positions = [position for _, o in recorded for position in o.top_logprobs]
    width = max(map(len, positions))
    ids = np.full((len(positions), width), UNKNOWN, np.int32)
    logprobs = np.full((len(positions), width), _NEVER, np.float32)
    for row, position in enumerate(positions):
        ids[row, : len(position)] = list(position)
        logprobs[row, : len(position)] = list(position.values())
    with replacing(directory / ANSWERS_FILE) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            prompts=np.concatenate([np.asarray(prompt, np.int32) for prompt, _ in recorded]),
            prompt_lengths=np.asarray([len(prompt) for prompt, _ in recorded]),
            tokens=np.concatenate([np.asarray(o.token_ids, np.int32) for _, o in recorded]),
            lengths=np.asarray([len(o.token_ids) for _, o in recorded]),
            top_ids=ids,
            top_logprobs=logprobs,
            levels=np.concatenate([_levels(o) for _, o in recorded]),
        )


def load_answers(directory: Path) -> list[ServedAnswer]:
    """Read what `save_answers` wrote.

    Raises:
        ReplayError: nothing was recorded there, or it cannot be read.
    """
    file = directory / ANSWERS_FILE
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as found:
            stored = {name: found[name] for name in found.files}
        ends = np.cumsum(stored["lengths"])[:-1]
        prompts = np.split(stored["prompts"], np.cumsum(stored["prompt_lengths"])[:-1])
        parts = [np.split(stored[name], ends) for name in ("tokens", "top_ids", "top_logprobs", "levels")]
        return [ServedAnswer(*answer) for answer in zip(prompts, *parts, strict=True)]
    except FileNotFoundError:
        raise ReplayError(
            f"{file}: no such file. Replay again with `--top-logprobs 100`, which records what served-kl compares."
        ) from None
    except OSError as e:
        raise ReplayError(f"{file} cannot be read ({e}).") from e
    except _DAMAGE as e:  # numpy's words would have it unpickled
        raise ReplayError(f"{file} is damaged, or not of a replay. Replay again with --top-logprobs.") from e


def _levels(outcome: Outcome) -> NDArray[np.int16]:
    """Return the level of each token; UNKNOWN for all where the runs of the receipt do not add up to them."""
    levels = [level for level, count in outcome.token_levels for _ in range(count)]
    known = levels if len(levels) == len(outcome.token_ids) else [UNKNOWN] * len(outcome.token_ids)
    return np.asarray(known, np.int16)
