"""What every rank in miniature does with a command, whatever stands for its memory, and what the ports promise it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from morphserve.control import Ledgers, Plan, Reply
from morphserve.control.budget import RankBytes


@dataclass(slots=True)
class FakeTicket:
    """Replies that arrive `delay` polls after all of them exist, and never before those of an earlier command."""

    delay: int
    num_ranks: int
    replies: dict[int, Reply] = field(default_factory=dict)
    taken: bool = False
    earlier: list[FakeTicket] = field(default_factory=list)

    def poll(self) -> tuple[Reply, ...] | None:
        assert not self.taken, "polled again after the replies were taken"
        if len(self.replies) < self.num_ranks or not all(ticket.taken for ticket in self.earlier):
            return None
        if self.delay > 0:
            self.delay -= 1
            return None
        self.taken, self.earlier = True, []
        return tuple(self.replies[rank] for rank in sorted(self.replies))


@dataclass(slots=True)
class RankState:
    """One worker, without its memory."""

    index: int
    formats: list[str]
    staged: Plan | None = None
    revision: int = 0


R = TypeVar("R", bound=RankState)


class RankRules(ABC, Generic[R]):
    """An `ExecutorPort` in front of ranks that assert what the ports promise them, and hold their budgets."""

    seconds_per_layer = 0.001
    in_background = False

    def __init__(self, ranks: list[R], sizes: Sequence[RankBytes], ledgers: Ledgers) -> None:
        self.ranks = ranks
        self._sizes = sizes
        self._budgets_bytes = [ledger.budget_bytes for ledger in ledgers]

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    def prepare(self, plan: Plan) -> FakeTicket:
        return self._send("prepare", plan)

    def commit(self, plan: Plan) -> FakeTicket:
        assert not plan.alone or (self.num_ranks == 1 and not self.in_background), "layers without a vote"
        return self._send("alone" if plan.alone else "commit", plan)

    def abort(self, plan: Plan) -> FakeTicket:
        return self._send("abort", plan)

    # ---- what stands for memory

    @abstractmethod
    def _send(self, command: str, plan: Plan) -> FakeTicket:
        """Put it where the ranks will meet it."""

    @abstractmethod
    def _error(self, command: str, plan: Plan, rank: R) -> str:
        """Why the rank fails, '' = it does not."""

    @abstractmethod
    def _mapped(self, rank: R) -> int: ...

    @abstractmethod
    def _copy(self, plan: Plan, rank: R) -> None: ...

    @abstractmethod
    def _unmap(self, num_kv_blocks: int, rank: R) -> None: ...

    @abstractmethod
    def _map(self, num_kv_blocks: int, rank: R) -> None:
        """Up to so many, or as many as the rank can."""

    # ---- commands

    def _obey(self, command: str, plan: Plan, rank: R) -> Reply:
        assert plan.revision >= rank.revision, "a rank met a revision it has passed"
        rank.revision = plan.revision
        error = self._error(command, plan, rank)
        if command == "alone":
            self._prepare_and_commit(plan, rank, prepares=not error)
        elif not error:
            getattr(self, f"_{command}")(plan, rank)
        return Reply(
            rank=rank.index,
            revision=plan.revision,
            ok=not error,
            error=error,
            elapsed_s=self.seconds_per_layer * len(plan.layer_formats),
            num_kv_blocks=self._mapped(rank),
            weight_bytes=self._weight_bytes(rank),
            staging_bytes=self._staging_bytes(rank),
            kv_moved=not (error and plan.copies and command == "commit"),  # it has done nothing of it
        )

    def _prepare(self, plan: Plan, rank: R) -> None:
        assert rank.staged is None, "two plans prepared at once"
        assert plan.layer_formats, "nothing to prepare"
        rank.staged = plan
        self._check_budget(rank)

    def _prepare_and_commit(self, plan: Plan, rank: R, prepares: bool) -> None:
        first = replace(plan, layer_formats=(), num_kv_blocks=min(plan.num_kv_blocks, self._mapped(rank)))
        self._commit(first, rank)
        if prepares:
            layers = replace(plan, copies=())
            self._prepare(layers, rank)
            self._commit(layers, rank)

    def _abort(self, plan: Plan, rank: R) -> None:
        assert rank.staged is None or rank.staged == plan
        rank.staged = None

    def _commit(self, plan: Plan, rank: R) -> None:
        sources, destinations = {s for s, _ in plan.copies}, {d for _, d in plan.copies}
        assert len(destinations) == len(plan.copies) and not sources & destinations, "copies overlap"
        if plan.copies:
            self._copy(plan, rank)
        if plan.num_kv_blocks < self._mapped(rank):
            self._unmap(plan.num_kv_blocks, rank)
        if plan.layer_formats:
            assert rank.staged == plan, "commit without prepare"
            for layer, fmt in plan.layer_formats:
                rank.formats[layer] = fmt
            rank.staged = None
        self._check_budget(rank)
        if plan.num_kv_blocks > self._mapped(rank):
            self._map(plan.num_kv_blocks, rank)
        self._check_budget(rank)

    def _weight_bytes(self, rank: R) -> int:
        return self._sizes[rank.index].weight(rank.formats)

    def _staging_bytes(self, rank: R) -> int:
        staged = () if rank.staged is None else rank.staged.layer_formats
        return sum(self._sizes[rank.index].layers[fmt][layer] for layer, fmt in staged)

    def _check_budget(self, rank: R) -> None:
        kv_bytes = self._mapped(rank) * self._sizes[rank.index].kv_block_bytes
        total, budget = self._weight_bytes(rank) + self._staging_bytes(rank) + kv_bytes, self._budgets_bytes[rank.index]
        assert total <= budget, f"rank {rank.index} holds {total} B of {budget}"
