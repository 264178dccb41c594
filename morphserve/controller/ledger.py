"""Bytes of one rank, in integers: what may be resident at any moment of a transition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from morphserve.errors import LedgerError
from policies.types import Ladder

Account = Literal["weights", "kv_blocks", "staging"]
_REMEDY: Mapping[Account, str] = {
    "kv_blocks": "Release first: switch layers before growing KV.",
    "weights": "Release first: shrink KV before restoring layers.",
    "staging": "Release first: commit or abort what is prepared, or lower transition.max_layers_per_step.",
}


class Ledger:
    """No rank holds more than these figures say, so one ledger speaks for all of them.

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


def make_ledger(ladder: Ladder, kv_block_bytes: int, staging_bytes: int) -> Ledger:
    """The ledger of a rank at level 0: what it holds there, plus room to stage one chunk.

    Args:
        ladder: all levels; level 0 gives weights and KV of the budget.
        kv_block_bytes: bytes of one KV block on one rank.
        staging_bytes: room for what is prepared but not committed, see `largest_chunk_bytes`.
    """
    base = ladder[0]
    kv_bytes = base.num_kv_blocks * kv_block_bytes
    ledger = Ledger(
        base.weight_bytes + kv_bytes + staging_bytes,
        kv_block_bytes=kv_block_bytes,
        staging_reserve_bytes=staging_bytes,
    )
    ledger.reserve("weights", base.weight_bytes)
    ledger.reserve("kv_blocks", kv_bytes)
    return ledger


def largest_chunk_bytes(layer_bytes: Mapping[str, Sequence[int]], max_layers_per_step: int) -> int:
    """Staging reserve: what one chunk takes beyond the budget of the level it leaves.

    For a layer that is the smaller of its two formats' sizes, so at most the second largest of all: a
    restore stages the largest, but the KV it gave back first has paid the difference.
    """
    second = sorted((sorted(sizes)[-2] for sizes in zip(*layer_bytes.values(), strict=True)), reverse=True)
    return sum(second[:max_layers_per_step])
