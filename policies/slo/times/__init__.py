"""How long steps and switches take at each level, and what predictions made of that have been worth so far."""

from __future__ import annotations

from policies.slo.times.correction import Correction
from policies.slo.times.level_times import CalibratedTimes, LearnedTimes, LevelTimes
from policies.slo.times.moves import LAYERS_PER_STEP, layers_between

__all__ = ["LAYERS_PER_STEP", "CalibratedTimes", "Correction", "LearnedTimes", "LevelTimes", "layers_between"]
