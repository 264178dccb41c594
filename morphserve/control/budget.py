"""Bytes of each rank, in integers: what its layers and KV blocks take, and what may be resident at any moment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from morphserve.errors import LedgerError
from policies import BASE_FORMAT, Ladder

LayerBytes = Mapping[str, Sequence[int]]  # format -> bytes of each decoder layer on one rank
Stage = tuple[int, ...]  # indices of the ranks that hold a layer
Account = Literal["weights", "kv_blocks", "staging"]
_REMEDY: Mapping[Account, str] = {
    "kv_blocks": "Release first: switch layers before growing KV.",
    "weights": "Release first: shrink KV before restoring layers.",
    "staging": "Release first: commit or abort what is prepared, or lower transition.max_layers_per_step.",
}


@dataclass(frozen=True, slots=True)
class RankBytes:
    """The bytes that one rank holds. Ranks of a stage have the same layers; other stages' layers count 0 bytes."""

    layers: LayerBytes
    kv_block_bytes: int  # of one KV block, all of this rank's layers together
    kv_granularity: int = 1  # blocks that share memory pages, so that they can only be mapped together

    def weight(self, formats: Sequence[str]) -> int:
        """Return the bytes of all layers, each in the format that stands at its id."""
        return sum(self.layers[fmt][layer] for layer, fmt in enumerate(formats))


def kv_granularity(ranks: Sequence[RankBytes]) -> int:
    """Return the smallest number of KV blocks that is whole pages on every rank."""
    return math.lcm(*(rank.kv_granularity for rank in ranks))


def paid_blocks(ranks: Sequence[RankBytes], base: Sequence[str], formats: Sequence[str]) -> int:
    """Return the KV blocks that every rank has freed the bytes of, once its layers are in `formats` instead of `base`.

    Whole granularities: what is freed beyond them lies idle until it adds up.
    """
    paid = min((rank.weight(base) - rank.weight(formats)) // rank.kv_block_bytes for rank in ranks)
    granularity = kv_granularity(ranks)
    return paid // granularity * granularity


def most_uneven(ranks: Sequence[RankBytes], ladder: Ladder) -> tuple[int, int, int] | None:
    """Find the level on which stages differ most in the blocks they pay for, by more than one layer does.

    Returns:
        Level, blocks of the scarcest and of the richest rank; None where all levels are even.
    """
    base = ladder[0].layer_formats
    paid = [
        (level.index, [(rank.weight(base) - rank.weight(level.layer_formats)) // rank.kv_block_bytes for rank in ranks])
        for level in ladder
    ]
    layer = max(max(rank.layers[BASE_FORMAT]) // rank.kv_block_bytes for rank in ranks)
    level, blocks = max(paid, key=lambda row: max(row[1]) - min(row[1]))
    return (level, min(blocks), max(blocks)) if max(blocks) - min(blocks) > layer else None


def stage_of(ranks: Sequence[RankBytes], layer: int) -> Stage:
    """Return the ranks that hold a layer."""
    return tuple(i for i, rank in enumerate(ranks) if rank.layers[BASE_FORMAT][layer] > 0)


def balance(ranks: Sequence[RankBytes], order: Sequence[int], formats: Sequence[str], new: str) -> list[int]:
    """Order `order` with the pipeline stages in turn: next comes a layer of the stage that pays for the fewest blocks.

    Only the blocks of the scarcest stage are published; what another frees beyond them lies idle. Layers of one
    stage keep their order, so a single stage keeps all of it.

    Args:
        ranks: all of them.
        order: layer ids.
        formats: of each layer now.
        new: the format they go to.
    """
    base = [BASE_FORMAT] * len(formats)
    paid = [(rank.weight(base) - rank.weight(formats)) / rank.kv_block_bytes for rank in ranks]
    waiting: dict[Stage, list[tuple[int, int]]] = {}  # (place in `order`, layer), next one last
    for place, layer in reversed(list(enumerate(order))):
        waiting.setdefault(stage_of(ranks, layer), []).append((place, layer))
    balanced = []
    while waiting:
        stage = min(waiting, key=lambda held: (min(paid[rank] for rank in held), waiting[held][-1]))
        _, layer = waiting[stage].pop()
        if not waiting[stage]:
            del waiting[stage]
        balanced.append(layer)
        for i in stage:
            freed = ranks[i].layers[formats[layer]][layer] - ranks[i].layers[new][layer]
            paid[i] += freed / ranks[i].kv_block_bytes
    return balanced


def alternate(ranks: Sequence[RankBytes], layers: Sequence[int]) -> list[int]:
    """Order `layers` with pipeline stages in turn, one each: a swap batch of them costs all stages about alike."""
    seen: dict[Stage, int] = {}
    turns = []
    for place, layer in enumerate(layers):
        stage = stage_of(ranks, layer)
        turns.append((seen.get(stage, 0), place, layer))
        seen[stage] = seen.get(stage, 0) + 1
    return [layer for _, _, layer in sorted(turns)]


class Ledger:
    """The memory accounts of one rank, which never holds more than they say.

    Promise: `used_bytes <= budget_bytes` after every call; a call that would break it raises and
    changes nothing.
    """

    def __init__(self, budget_bytes: int, *, kv_block_bytes: int, staging_reserve_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.kv_block_bytes = kv_block_bytes
        self.staging_reserve_bytes = staging_reserve_bytes
        self._accounts: dict[Account, int] = {"weights": 0, "kv_blocks": 0, "staging": 0}

    def __getitem__(self, account: Account) -> int:
        return self._accounts[account]

    @property
    def used_bytes(self) -> int:
        """Bytes on all accounts."""
        return sum(self._accounts.values())

    @property
    def free_bytes(self) -> int:
        """Bytes that can still be reserved."""
        return self.budget_bytes - self.used_bytes

    def reserve(self, account: Account, num_bytes: int) -> None:
        """Put `num_bytes` on `account` before they become resident.

        Raises:
            LedgerError: the budget does not have them.
        """
        _check_amount(account, num_bytes)
        if num_bytes > self.free_bytes:
            raise LedgerError(
                f"{account} wants {num_bytes:,} B, free are {self.free_bytes:,} of {self.budget_bytes:,} "
                f"({self._balance()}). {_REMEDY[account]}"
            )
        self._accounts[account] += num_bytes

    def release(self, account: Account, num_bytes: int) -> None:
        """Take `num_bytes` off `account` after they have left memory.

        Raises:
            LedgerError: the account does not hold them.
        """
        _check_amount(account, num_bytes)
        if num_bytes > self._accounts[account]:
            raise LedgerError(
                f"{account} gives back {num_bytes:,} B, but holds {self._accounts[account]:,} "
                f"({self._balance()}). Release only what was reserved."
            )
        self._accounts[account] -= num_bytes

    def transfer(self, source: Account, destination: Account, num_bytes: int) -> None:
        """Rename resident bytes: staged weights become the layer's weights.

        Raises:
            LedgerError: `source` does not hold them.
        """
        self.release(source, num_bytes)
        self._accounts[destination] += num_bytes

    def snapshot(self) -> dict[str, int]:
        """Return budget and accounts, for status and logs."""
        return {"budget_bytes": self.budget_bytes, **{f"{k}_bytes": v for k, v in self._accounts.items()}}

    def _balance(self) -> str:
        return ", ".join(f"{account}={amount:,}" for account, amount in self._accounts.items())


def _check_amount(account: Account, num_bytes: int) -> None:
    if num_bytes < 0:
        raise LedgerError(
            f"{account}: amount is {num_bytes:,} B, must be 0 or more. Reserve or release instead."
        )


class Ledgers:
    """One ledger a rank. Ranks hold different layers (pipeline) or slices (tensor), but the same number of KV blocks.

    Promise: a call that one rank's budget does not allow raises and changes none of them.
    """

    def __init__(self, ledgers: Sequence[Ledger], num_kv_blocks: int) -> None:
        self._ledgers = tuple(ledgers)
        self._num_kv_blocks = num_kv_blocks

    def __getitem__(self, rank: int) -> Ledger:
        return self._ledgers[rank]

    def __iter__(self) -> Iterator[Ledger]:
        return iter(self._ledgers)

    @property
    def num_kv_blocks(self) -> int:
        """KV blocks booked on every rank, null block included."""
        return self._num_kv_blocks

    def reserve_staging(self, amounts: Sequence[int]) -> None:
        """Reserve what the ranks are about to prepare; one amount a rank.

        Raises:
            LedgerError: a rank's budget does not have them.
        """
        self._reserve("staging", amounts)

    def release_staging(self, amounts: Sequence[int]) -> None:
        """Release what was prepared and is gone again."""
        for ledger, amount in zip(self._ledgers, amounts, strict=True):
            ledger.release("staging", amount)

    def switch(self, new: Sequence[int], old: Sequence[int]) -> None:
        """Book what was staged as layers, and free what they were."""
        for ledger, staged, freed in zip(self._ledgers, new, old, strict=True):
            ledger.transfer("staging", "weights", staged)
            ledger.release("weights", freed)

    def book_kv(self, num_kv_blocks: int) -> None:
        """Book the KV blocks that every rank holds, or is about to be told to hold.

        Raises:
            LedgerError: a rank's budget does not have the blocks.
        """
        change = num_kv_blocks - self._num_kv_blocks
        if change >= 0:
            self._reserve("kv_blocks", [change * ledger.kv_block_bytes for ledger in self._ledgers])
        else:
            for ledger in self._ledgers:
                ledger.release("kv_blocks", -change * ledger.kv_block_bytes)
        self._num_kv_blocks = num_kv_blocks

    def snapshots(self) -> list[dict[str, int]]:
        """Return budget and accounts of each rank, for status and logs."""
        return [ledger.snapshot() for ledger in self._ledgers]

    @property
    def tightest(self) -> int:
        """The rank with the least left of its budget."""
        return min(range(len(self._ledgers)), key=lambda rank: self._ledgers[rank].free_bytes)

    def _reserve(self, account: Account, amounts: Sequence[int]) -> None:
        done: list[tuple[Ledger, int]] = []
        try:
            for ledger, amount in zip(self._ledgers, amounts, strict=True):
                ledger.reserve(account, amount)
                done.append((ledger, amount))
        except LedgerError:
            for ledger, amount in done:
                ledger.release(account, amount)
            raise


def make_ledgers(ladder: Ladder, ranks: Sequence[RankBytes], staging_bytes: Sequence[int]) -> Ledgers:
    """Make the ledgers of ranks at level 0: what each holds there, plus room to stage one swap batch.

    Args:
        ladder: all levels; level 0 gives weights and KV of the budgets.
        ranks: what they hold.
        staging_bytes: by rank, room for what is prepared but not committed, see `largest_batch_bytes`.
    """
    base, ledgers = ladder[0], []
    for rank, staging in zip(ranks, staging_bytes, strict=True):
        weights, kv_bytes = rank.weight(base.layer_formats), base.num_kv_blocks * rank.kv_block_bytes
        ledger = Ledger(
            weights + kv_bytes + staging, kv_block_bytes=rank.kv_block_bytes, staging_reserve_bytes=staging
        )
        ledger.reserve("weights", weights)
        ledger.reserve("kv_blocks", kv_bytes)
        ledgers.append(ledger)
    return Ledgers(ledgers, base.num_kv_blocks)


def largest_batch_bytes(layers: LayerBytes, max_layers_per_step: int) -> int:
    """Return the staging reserve of a rank: what one swap batch takes beyond the budget of the level it leaves.

    For a layer that is the smaller of its two formats' sizes, so at most the second largest of all: a
    restore stages the largest, but the KV it gave back first has paid the difference. Nothing where there is one
    format: then no layer ever changes.
    """
    if len(layers) < 2:
        return 0
    second = sorted((sorted(sizes)[-2] for sizes in zip(*layers.values(), strict=True)), reverse=True)
    return sum(second[:max_layers_per_step])


def layers_within(layers: LayerBytes, least: int, most: int, num_bytes: int) -> int:
    """Return how many layers a swap batch may take with a staging reserve of `num_bytes`: from `least` to `most`."""
    found = least
    while found < most and largest_batch_bytes(layers, found + 1) <= num_bytes:
        found += 1
    return found
