"""Bytes of each rank, in integers: what may be resident at any moment of a transition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from morphserve.control.rank_bytes import LayerBytes, RankBytes
from morphserve.errors import LedgerError
from policies import Ladder

Account = Literal["weights", "kv_blocks", "staging"]
_REMEDY: Mapping[Account, str] = {
    "kv_blocks": "Release first: switch layers before growing KV.",
    "weights": "Release first: shrink KV before restoring layers.",
    "staging": "Release first: commit or abort what is prepared, or lower transition.max_layers_per_step.",
}


class Ledger:
    """The accounts of one rank, which never holds more than they say.

    Promise: `used_bytes <= budget_bytes` after every call; a call that would break it raises and
    changes nothing.
    """

    def __init__(self, budget_bytes: int, *, kv_block_bytes: int, staging_reserve_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.kv_block_bytes = kv_block_bytes
        self.staging_reserve_bytes = staging_reserve_bytes
        self._accounts: dict[Account, int] = {"weights": 0, "kv_blocks": 0, "staging": 0}

    def __getitem__(self, account: Account) -> int:
        """Bytes on one account."""
        return self._accounts[account]

    @property
    def used_bytes(self) -> int:
        """Bytes on all accounts."""
        return sum(self._accounts.values())

    @property
    def free_bytes(self) -> int:
        """What can still be reserved."""
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
        """Resident bytes change their name: staged weights become the layer's weights.

        Raises:
            LedgerError: `source` does not hold them.
        """
        self.release(source, num_bytes)
        self._accounts[destination] += num_bytes

    def snapshot(self) -> dict[str, int]:
        """Budget and accounts, for status and logs."""
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
        """The ledger of one rank."""
        return self._ledgers[rank]

    def __iter__(self) -> Iterator[Ledger]:
        return iter(self._ledgers)

    @property
    def num_kv_blocks(self) -> int:
        """KV blocks booked on every rank, null block included."""
        return self._num_kv_blocks

    def reserve_staging(self, amounts: Sequence[int]) -> None:
        """Before the ranks are asked to prepare; one amount a rank.

        Raises:
            LedgerError: a rank's budget does not have them.
        """
        self._reserve("staging", amounts)

    def release_staging(self, amounts: Sequence[int]) -> None:
        """What was prepared is gone again."""
        for ledger, amount in zip(self._ledgers, amounts, strict=True):
            ledger.release("staging", amount)

    def switch(self, new: Sequence[int], old: Sequence[int]) -> None:
        """What was staged is the layers now, and what they were is freed."""
        for ledger, staged, freed in zip(self._ledgers, new, old, strict=True):
            ledger.transfer("staging", "weights", staged)
            ledger.release("weights", freed)

    def book_kv(self, num_kv_blocks: int) -> None:
        """What every rank holds, or is about to be told to hold.

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
        """Budget and accounts of each rank, for status and logs."""
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
    """Of ranks at level 0: what each holds there, plus room to stage one chunk.

    Args:
        ladder: all levels; level 0 gives weights and KV of the budgets.
        ranks: what they hold.
        staging_bytes: by rank, room for what is prepared but not committed, see `largest_chunk_bytes`.
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


def largest_chunk_bytes(layers: LayerBytes, max_layers_per_step: int) -> int:
    """Staging reserve of a rank: what one chunk takes beyond the budget of the level it leaves.

    For a layer that is the smaller of its two formats' sizes, so at most the second largest of all: a
    restore stages the largest, but the KV it gave back first has paid the difference.
    """
    second = sorted((sorted(sizes)[-2] for sizes in zip(*layers.values(), strict=True)), reverse=True)
    return sum(second[:max_layers_per_step])


def layers_within(layers: LayerBytes, least: int, most: int, num_bytes: int) -> int:
    """How many layers a chunk may take with a staging reserve of `num_bytes`: at least `least`, at most `most`."""
    found = least
    while found < most and largest_chunk_bytes(layers, found + 1) <= num_bytes:
        found += 1
    return found
