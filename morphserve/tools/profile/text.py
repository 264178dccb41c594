"""Parts of a transformers model, and windows of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from morphserve.errors import ProfilingError
from morphserve.user_input import user_path

_MAX_CHARACTERS = 2_000_000  # tokenizing more would take longer than profiling

def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a transformers model.

    Raises:
        ProfilingError: it has none where dense decoders have them.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ProfilingError(
            f"{type(model).__name__} has no decoder layers under 'model.layers'. Profile a dense decoder-only model."
        )
    return layers


def token_windows(
    tokenizer: Any, files: Sequence[Path], num_windows: int, length: int, offset: float = 0.0
) -> Tensor:
    """Return `num_windows` windows of `length` tokens, spread evenly over each file: [all windows, length].

    Args:
        tokenizer: has `encode`.
        files: text, or JSON lines of QMSum's form, whose meetings are read as text.
        num_windows: of each file.
        length: of a window.
        offset: where a window starts in its share of the file, [0, 1): another offset gives other text.

    Raises:
        ProfilingError: a file is too short.
    """
    rows: list[list[int]] = []
    for file in files:
        ids = tokenizer.encode(read_text(file))
        if len(ids) < num_windows * length:
            raise ProfilingError(
                f"{file} has {len(ids):,} tokens, {num_windows} windows of {length} need {num_windows * length:,}. "
                "Give a longer text, or lower --windows."
            )
        stride = len(ids) // num_windows
        shift = min(int(offset * stride), stride - length)
        rows += [ids[i * stride + shift : i * stride + shift + length] for i in range(num_windows)]
    return torch.tensor(rows)


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a model.

    Raises:
        ProfilingError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # what transformers makes of files that are damaged, or of no model
        raise ProfilingError(f"{directory} has no tokenizer that can be loaded ({error}). Give a model.") from error


def read_text(file: Path) -> str:
    """Read a text file, or what was said in the meetings of a QMSum file (JSON lines with `meeting_transcripts`).

    Raises:
        ProfilingError: it cannot be read.
    """
    try:
        text = user_path(file).read_text(encoding="utf-8")[:_MAX_CHARACTERS]
        if file.suffix != ".jsonl":
            return text
        lines = text.splitlines()[:-1] if len(text) == _MAX_CHARACTERS else text.splitlines()
        turns = [turn for line in lines for turn in json.loads(line)["meeting_transcripts"]]
        return "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in turns)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProfilingError(f"{file} cannot be read ({error}). Give text, or JSON lines as QMSum has them.") from error
