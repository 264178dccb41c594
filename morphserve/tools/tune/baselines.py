"""What a tuned policy must beat (in reports: anchors): no policy, a model quantized for good, the policy as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from morphserve.config import MorphServeConfig
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.evaluate import Evaluator, Invalid, World
from morphserve.tools.tune.score import Scores
from policies import BASE_FORMAT, Ladder, StaticConfig

STOCK, CURRENT = "stock", "current"


@dataclass(frozen=True, slots=True)
class Baseline:
    """A policy that nobody tuned."""

    name: str
    config: MorphServeConfig | None  # None: stock vLLM
    scores: Scores

    @property
    def is_static(self) -> bool:
        """Whether it never changes the level."""
        return self.name != CURRENT


def baseline_configs(config: MorphServeConfig, ladder: Ladder) -> dict[str, MorphServeConfig | None]:
    """Return configs by name: stock, each format that all layers can have, and the config as given."""
    whole = [lv.layer_formats[0] for lv in ladder if len(set(lv.layer_formats)) == 1]
    baselines: dict[str, MorphServeConfig | None] = {STOCK: None}
    for fmt in dict.fromkeys(whole):
        if fmt != BASE_FORMAT:
            static = StaticConfig(kind="static", level=fmt)
            baselines[f"static_{fmt.replace('/', '_')}"] = config.model_copy(update={"policy": static})
    return baselines | {CURRENT: config}


def score_all(
    evaluator: Evaluator, named: Sequence[tuple[str, MorphServeConfig | None]], windows: Sequence[int] | None = None
) -> list[Scores]:
    """Score what must be valid, on dev and held-out windows.

    Raises:
        TuningError: a server would refuse one of them at start.
    """
    world: World = evaluator.world
    indices = range(len(world.windows)) if windows is None else windows
    found = []
    for (name, _), scored in zip(named, evaluator.scores([c for _, c in named], indices), strict=True):
        if isinstance(scored, Invalid):
            raise TuningError(f"{name}: {scored.reason}")
        by_index = dict(zip(indices, scored, strict=True))
        found.append(
            Scores(
                tuple(by_index[i] for i in world.dev if i in by_index),
                tuple(by_index[i] for i in world.held_out if i in by_index),
            )
        )
    return found


def score_baselines(evaluator: Evaluator, config: MorphServeConfig, ladder: Ladder) -> list[Baseline]:
    """Score all baselines on all windows.

    Raises:
        TuningError: the config as given cannot be served.
    """
    named = list(baseline_configs(config, ladder).items())
    scores = score_all(evaluator, named)
    return [Baseline(name, own, score) for (name, own), score in zip(named, scores, strict=True)]
