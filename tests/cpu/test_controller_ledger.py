"""The ledger: never over budget, and messages that help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.control import Ledger, largest_batch_bytes, layers_within, make_ledgers
from morphserve.errors import LedgerError
from tests.fakes import LAYER_BYTES, Rig

pytestmark = pytest.mark.cpu


def make() -> Ledger:
    ledger = Ledger(1000, kv_block_bytes=10, staging_reserve_bytes=100)
    ledger.reserve("weights", 700)
    return ledger


def test_refusal_says_value_limit_remedy() -> None:
    """Guards: an overdraft, or a refusal that nobody can act on."""
    ledger = make()
    with pytest.raises(LedgerError) as error:
        ledger.reserve("kv_blocks", 400)
    assert str(error.value) == (
        "kv_blocks wants 400 B, free are 300 of 1,000 (weights=700, kv_blocks=0, staging=0). "
        "Release first: switch layers before growing KV."
    )
    assert ledger.used_bytes == 700


def test_releasing_what_is_not_held_is_refused() -> None:
    """Guards: an account below zero, which would let another one overdraw."""
    ledger = make()
    for call in (lambda: ledger.release("weights", 701), lambda: ledger.transfer("staging", "weights", 1)):
        with pytest.raises(LedgerError, match="Release only what was reserved"):
            call()
    with pytest.raises(LedgerError, match="0 or more"):
        ledger.reserve("staging", -1)
    assert ledger.snapshot() == {
        "budget_bytes": 1000, "weights_bytes": 700, "kv_blocks_bytes": 0, "staging_bytes": 0,
    }  # fmt: skip


operations = st.tuples(
    st.sampled_from(["reserve", "release", "transfer"]),
    st.sampled_from(["weights", "kv_blocks", "staging"]),
    st.sampled_from(["weights", "kv_blocks", "staging"]),
    st.integers(-50, 1200),
)


@given(st.lists(operations))
def test_no_sequence_of_calls_overdraws(calls: list[tuple[str, str, str, int]]) -> None:
    """Guards: budget or an account broken by some order of calls."""
    ledger = make()
    for method, account, other, amount in calls:
        before = ledger.snapshot()
        try:
            if method == "transfer":
                ledger.transfer(account, other, amount)  # type: ignore[arg-type]
            else:
                getattr(ledger, method)(account, amount)
        except LedgerError:
            assert ledger.snapshot() == before
        assert ledger.used_bytes <= 1000 and ledger.free_bytes >= 0
        assert all(ledger[name] >= 0 for name in ("weights", "kv_blocks", "staging"))


def test_budget_is_level_zero_plus_one_batch() -> None:
    """Guards: a staging reserve too small for what a swap batch takes beyond its level, or needlessly large."""
    assert largest_batch_bytes(LAYER_BYTES, 2) == 660 + 560  # w8 beside base; base in the place of KV
    assert largest_batch_bytes(LAYER_BYTES, 99) == sum(LAYER_BYTES["w8"])
    rig = Rig(num_ranks=1)
    ledger = make_ledgers(rig.ladder, rig.ranks, [2400])[0]
    assert ledger.budget_bytes == 8300 + 20 * 130 + 2400
    assert ledger.free_bytes == 2400


def test_a_batch_fills_its_reserve() -> None:
    """Guards: a level in pieces though there is room for all of it, or a reserve beyond what it may take."""
    three = largest_batch_bytes(LAYER_BYTES, 3)
    assert layers_within(LAYER_BYTES, 1, 8, three) == 3
    assert layers_within(LAYER_BYTES, 1, 8, three - 1) == 2
    assert layers_within(LAYER_BYTES, 1, 2, three) == 2, "more than any level changes"
    assert layers_within(LAYER_BYTES, 5, 8, 0) == 5, "less than everywhere else"
