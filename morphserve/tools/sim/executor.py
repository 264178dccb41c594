"""One rank that obeys at once, as a single rank in the engine's own process does, and says how long that took."""

from __future__ import annotations

from morphserve.control import Plan, RankBytes, Reply
from morphserve.tools.sim.pace import Pace
from policies import BASE_FORMAT


class _Answered:
    """A reply that is there before anybody asks."""

    __slots__ = ("_replies",)

    def __init__(self, reply: Reply) -> None:
        self._replies = (reply,)

    def poll(self) -> tuple[Reply, ...] | None:
        return self._replies


class SimExecutor:
    """An `ExecutorPort` without memory behind it.

    Attributes:
        pause_s: seconds that commands took since it was last set to 0: the engine stands still for so long.
    """

    num_ranks = 1
    in_background = False

    def __init__(self, rank: RankBytes, num_layers: int, num_kv_blocks: int, pace: Pace, copy_s: float) -> None:
        self._rank = rank
        self._pace = pace
        self._copy_s = copy_s * pace.factor
        self._mapped = num_kv_blocks
        self.formats = [BASE_FORMAT] * num_layers
        self._weight_bytes = rank.weight(self.formats)
        self.pause_s = 0.0

    def prepare(self, plan: Plan) -> _Answered:
        """Refuse: nobody votes where there is one rank."""
        raise AssertionError(f"prepare r{plan.revision}: a rank that decides alone is told to commit")

    def abort(self, plan: Plan) -> _Answered:
        """Refuse: nothing is ever prepared and not switched."""
        raise AssertionError(f"abort r{plan.revision}: a single rank has nothing staged")

    def commit(self, plan: Plan) -> _Answered:
        """Copy, unmap, switch, map."""
        seconds = self._copy_s * len(plan.copies)
        sizes = self._rank.layers
        for layer, fmt in plan.layer_formats:
            new, old = sizes[fmt][layer], sizes[self.formats[layer]][layer]
            seconds += self._pace.move_s(is_degrade=new <= old)
            self.formats[layer] = fmt
            self._weight_bytes += new - old
        if plan.layer_formats:
            self._pace.set_formats(self.formats)
        self._mapped = plan.num_kv_blocks
        self.pause_s += seconds
        weights = self._weight_bytes
        return _Answered(
            Reply(0, plan.revision, True, elapsed_s=seconds, num_kv_blocks=self._mapped, weight_bytes=weights)
        )
