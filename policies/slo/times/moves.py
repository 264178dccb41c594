"""How long it takes to switch a layer, as the engine's own transitions have shown."""

from __future__ import annotations

from dataclasses import replace

from policies.step_times import LayerMove
from policies.types import Ladder, Signals

LAYERS_PER_STEP = 4  # switched between two steps, about: transition.max_layers_per_step and the pause allow so many

# Until one was seen, by the bytes of a layer as loaded: a core copies one that degrades and reads one that restores
# anew, at half of that. A device is given somewhat less than an H100 had under load, 15 and 24 GB/s; its way back is no
# slower. Too little rather than too much: then a level is entered a little early.
_COPY_BYTES_PER_S = 1.7e9
_DEVICE_BYTES_PER_S = 12e9
_MEMORY = 8  # transitions that a new one is one of, at most
_ROOM = 4.0  # a transition that took so many times longer waited for something else
_LEAST_S = 1e-5


def layers_between(ladder: Ladder) -> list[list[int]]:
    """Return, from each level to each other, how many layers have another format there."""
    formats = [level.layer_formats for level in ladder]
    return [[sum(a != b for a, b in zip(start, end, strict=True)) for end in formats] for start in formats]


class LearnedMoves:
    """The time of a layer by direction: a guess by its bytes, corrected by each transition that came through."""

    def __init__(self, ladder: Ladder, beside_steps: bool = False) -> None:
        """Guess."""
        layer_bytes = ladder[0].weight_bytes / len(ladder[0].layer_formats)
        copy_s, device_s = layer_bytes / _COPY_BYTES_PER_S, layer_bytes / _DEVICE_BYTES_PER_S
        self.move = LayerMove(device_s, device_s) if beside_steps else LayerMove(copy_s, 2 * copy_s)
        self._layers_between = layers_between(ladder)
        self._seen = {"degrade_s": 0, "restore_s": 0}
        self._last_s: float | None = None  # of the tick before
        self._way: tuple[float, int, int] | None = None  # a transition under way: since when, from and to which level

    def watch(self, s: Signals) -> None:
        """Follow the transition under way, if there is one, and learn from its end."""
        if s.target_level != s.level:
            if self._way is None and self._last_s is not None:
                self._way = (self._last_s, s.level, s.target_level)
            elif self._way is None or self._way[2] != s.target_level:
                self._way = (s.now_s, -1, s.target_level)  # met half-way, or it has turned: nobody knows how far it was
        elif self._way is not None:
            started_s, start, end = self._way
            self._way = None
            if start >= 0 and s.level == end:
                self._learn(s, start, s.now_s - started_s)
        self._last_s = s.now_s

    def _learn(self, s: Signals, start: int, seconds: float) -> None:
        layers = self._layers_between[start][s.level]
        if not layers:
            return
        name = "degrade_s" if s.level > start else "restore_s"
        known = max(getattr(self.move, name), _LEAST_S)
        own_s = max(seconds / layers - s.step_s / LAYERS_PER_STEP, _LEAST_S)  # beside the steps between swap batches
        self._seen[name] = min(self._seen[name] + 1, _MEMORY)
        ratio = min(max(own_s / known, 1 / _ROOM), _ROOM)
        self.move = replace(self.move, **{name: known * ratio ** (1 / self._seen[name])})
