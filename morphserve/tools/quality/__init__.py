"""What quality was served: recorded answers held against the model at full precision. Needs transformers, no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphserve.late import late

if TYPE_CHECKING:
    from morphserve.tools.quality.scoring import Scored, divergence, score_answers
    from morphserve.tools.quality.shares import LevelRow, level_rows

__all__ = ["LevelRow", "Scored", "divergence", "level_rows", "score_answers"]

_LATE = {
    "LevelRow": "shares",
    "Scored": "scoring",
    "divergence": "scoring",
    "level_rows": "shares",
    "score_answers": "scoring",
}
__getattr__ = late(__name__, _LATE)
