"""Whether the KV cache is short of blocks, now or soon."""

from __future__ import annotations

from collections.abc import Sequence

from policies.slo.predictor import Load
from policies.types import EngineLimits

_CALM_SHARE = 0.5  # of level 0's blocks
_PROMPT_S = 0.1  # who fits is admitted within
_AHEAD = 2.0  # a deeper level is entered so many times before the KV cache is full as the way there takes,
_AHEAD_S = 0.2  # which is so much more than predicted


class Room:
    """The blocks of each level, against what runs, waits and comes."""

    def __init__(self, usable_blocks: Sequence[int], limits: EngineLimits) -> None:
        self._usable = usable_blocks
        self._limits = limits

    def is_calm(self, load: Load) -> bool:
        """Return whether nobody waits, and what runs and comes will not fill half of level 0."""
        s = load.signals
        coming = load.arrival_rate * load.horizon_s
        blocks = (s.num_running + coming) * load.typical.final_blocks
        return not s.num_waiting and blocks < _CALM_SHARE * self._usable[0]

    def lasts(self, load: Load, level: int, way_s: float) -> bool:
        """Return whether a level's free blocks outlast a way of `way_s`, with who waits admitted and nobody ending."""
        s, size = load.signals, self._limits.block_size
        prompt_blocks = load.typical.prompt_tokens / size + 0.5
        free = self._usable[level] - s.used_kv_blocks - s.num_waiting * prompt_blocks
        taken_per_s = s.num_running / size / max(s.step_s, 1e-3) + load.arrival_rate * prompt_blocks
        return free > taken_per_s * _AHEAD * (way_s + _AHEAD_S)

    def waits_elsewhere(self, load: Load, level: int) -> bool:
        """Return whether requests wait although the next ones would fit: for prefill, or for max_num_seqs."""
        s = load.signals
        free = self._usable[min(level, len(self._usable) - 1)] - s.used_kv_blocks
        return free >= 2 * load.typical.final_blocks and s.oldest_wait_s > max(_PROMPT_S, 3 * s.step_s)
