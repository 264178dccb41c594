"""Prompts of exact token length, cut from real text, the same for the same seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from morphserve.tools.workload.errors import WorkloadError
from morphserve.tools.workload.workload import Workload
from morphserve.user_input import user_path

Encode = Callable[[str, bool], list[int]]  # text, add special tokens -> token ids


def load_encoder(tokenizer: str) -> Encode:
    """Load the model's own tokenizer, from a local directory or by its name.

    Raises:
        WorkloadError: there is no such tokenizer.
    """
    local = user_path(tokenizer) / "tokenizer.json"
    if local.is_file():
        from tokenizers import Tokenizer

        try:
            fast = Tokenizer.from_file(str(local))
        except Exception as e:  # tokenizers raises nothing narrower
            raise WorkloadError(f"tokenizer {local} cannot be read ({e}). Give --tokenizer another directory.") from e
        fast.no_truncation()
        return lambda text, special: list(fast.encode(text, add_special_tokens=special).ids)
    try:
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(tokenizer)
    except (ImportError, OSError, ValueError) as e:
        raise WorkloadError(
            f"tokenizer {tokenizer!r} cannot be loaded ({str(e).splitlines()[0]}). "
            "Give --tokenizer a directory with a tokenizer.json, or a model that is in the local cache."
        ) from e
    return lambda text, special: list(slow.encode(text, add_special_tokens=special))


class PromptMaker:
    """The cutter of prompts from a corpus.

    1. A prompt has exactly the tokens asked for.
    2. The same corpus, tokenizer, seed and workload give the same prompts, in any process.
    3. Requests whose leading hash ids are equal share that prefix; all others are different slices.
    """

    def __init__(self, corpus: str, encode: Encode, seed: int = 0) -> None:
        """Tokenize the corpus once.

        Raises:
            WorkloadError: a corpus too small to cut different prompts from.
        """
        self._seed = seed
        self._lead = encode("", True)  # what the model wants before every prompt, e.g. BOS
        self._tokens: list[int] = []
        self._starts: list[int] = []  # where a line of the text begins
        for line in corpus.splitlines():
            ids = encode(line.strip() + "\n", False) if line.strip() else []
            if ids:
                self._starts.append(len(self._tokens))
                self._tokens.extend(ids)
        if len(self._tokens) < 256:
            raise WorkloadError(
                f"corpus has {len(self._tokens)} tokens, needs at least 256. Give --corpus more text."
            )
        random.Random(seed).shuffle(self._starts)
        self._taken: dict[object, int] = {}

    def make(self, workload: Workload) -> list[list[int]]:
        """Cut one list of token ids per request."""
        self._taken.clear()
        return [
            self._prompt(index, request.input_tokens, request.hash_ids, workload.block_tokens)
            for index, request in enumerate(workload.requests)
        ]

    def _prompt(self, index: int, num_tokens: int, hash_ids: Sequence[int], block_tokens: int) -> list[int]:
        prompt = list(self._lead[: max(num_tokens - 1, 0)])
        # Without ids the request is a block of its own, as long as the prompt.
        blocks: list[object] = list(hash_ids) or [("request", index)]
        for position, block in enumerate(blocks):
            missing = num_tokens - len(prompt)
            last = position == len(blocks) - 1
            prompt += self._slice(block, missing if last else min(block_tokens, missing))
        return prompt

    def _slice(self, block: object, num_tokens: int) -> list[int]:
        start = self._start(block)
        out: list[int] = []
        while len(out) < num_tokens:  # a prompt may be longer than what is left of the corpus
            out += self._tokens[start : start + num_tokens - len(out)]
            start = 0
        return out

    def _start(self, block: object) -> int:
        """Return where the text of a block begins: at lines of the text first, when those are used up anywhere."""
        if block not in self._taken:
            order = len(self._taken)
            if order < len(self._starts):
                self._taken[block] = self._starts[order]
            else:
                digest = hashlib.blake2b(f"{self._seed}:{order}".encode(), digest_size=8).digest()
                self._taken[block] = int.from_bytes(digest, "big") % len(self._tokens)
        return self._taken[block]


def read_corpus(path: str | Path) -> str:
    """Read the text of a corpus file.

    Raises:
        WorkloadError: unreadable file.
    """
    try:
        return user_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise WorkloadError(f"corpus {path}: {e}. Give --corpus a UTF-8 text file.") from e
