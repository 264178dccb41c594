"""This process's rank: filled while vLLM loads, and asked by everything that vLLM then calls. One model a process."""

from __future__ import annotations

from dataclasses import dataclass, field

from morphserve.integration.worker.commands import Commands
from morphserve.integration.worker.cuda.graphs import LevelGraphs
from morphserve.integration.worker.kv import RankKV
from morphserve.integration.worker.layers import RankLayers
from morphserve.residence import RankTransition, Residence
from quant_layers import LayerSwapper


@dataclass(slots=True)
class Rank:
    """What a process holds of an engine with MorphServe; empty in the processes of one without.

    Attributes:
        residence: where its bytes are.
        layers: taken over while the weights were loaded.
        base_num_blocks: of level 0; None until the engine has planned: caches before that are for profiling.
        level_formats: of every level, by decoder layer id.
        kv: laid out for the deepest level.
        transition: of those two.
        graphs: CUDA graphs of every level, where there are any.
        graph_set_bytes: that vLLM keeps free of KV blocks for a graph set, until it captures; 0 = it counts none.
        graph_set_estimate: that it expects a graph set to take.
        commands: that it has met.
    """

    residence: Residence | None = None
    layers: RankLayers | None = None
    base_num_blocks: int | None = None
    level_formats: tuple[tuple[str, ...], ...] = ()
    kv: RankKV | None = None
    transition: RankTransition | None = None
    graphs: LevelGraphs | None = None
    graph_set_bytes: int = 0
    graph_set_estimate: int = 0
    commands: Commands = field(default_factory=Commands)

    @property
    def swapper(self) -> LayerSwapper:
        """Of layers that are installed."""
        assert self.layers is not None and self.layers.swapper is not None
        return self.layers.swapper


_rank = Rank()


def rank() -> Rank:
    """Return this process's rank."""
    return _rank


def begin(new: Rank) -> None:
    """Hold `new` from now on: of an earlier engine of this process nothing stays."""
    global _rank
    _rank = new
