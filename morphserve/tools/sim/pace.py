"""How long a simulated step takes, with the layers in the formats they have at that moment."""

from __future__ import annotations

import random
from collections.abc import Sequence

from policies import BASE_FORMAT, MorphLevel, StepTimes


class Pace:
    """The step times of each mixture of formats, each worked out once.

    Attributes:
        factor: on all times; 1.1 = a machine 10 % slower.
    """

    def __init__(
        self, times: StepTimes, num_layers: int, factor: float = 1.0, noise: float = 0.0, seed: int = 0
    ) -> None:
        """Start with all layers as they were loaded.

        Args:
            noise: standard deviation of a step's time, relative.
            seed: of the noise.
        """
        self._times = times
        self._known: dict[tuple[str, ...], tuple[float, float, float, float]] = {}
        self._noise = noise
        self._random = random.Random(seed)
        self.factor = factor
        self.set_formats((BASE_FORMAT,) * num_layers)

    def set_formats(self, formats: Sequence[str]) -> None:
        """Take in that layers have switched.

        Raises:
            ValueError: a format was never calibrated.
        """
        key = tuple(formats)
        figures = self._known.get(key)
        if figures is None:
            time = self._times.of_level(MorphLevel(0, key, 0, 0))
            scaled = (time.base_s, time.per_seq_s, time.per_prefill_token_s, time.per_context_token_s)
            base, seq, prefill, context = (self.factor * figure for figure in scaled)
            figures = self._known[key] = (base, seq, prefill, context)
        self._base_s, self._seq_s, self._prefill_s, self._context_s = figures

    def seconds(self, num_seqs: int, prefill_tokens: int, context_tokens: int) -> float:
        """Return the time of the next step."""
        seconds = (
            self._base_s + self._seq_s * num_seqs + self._prefill_s * prefill_tokens + self._context_s * context_tokens
        )
        if self._noise:
            seconds *= max(1.0 + self._random.gauss(0.0, self._noise), 0.1)
        return seconds

    def move_s(self, is_degrade: bool) -> float:
        """Return the time of one layer that switches."""
        move = self._times.move
        return self.factor * (move.degrade_s if is_degrade else move.restore_s)
