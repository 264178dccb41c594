"""What a rank answers, whatever a command does."""

from __future__ import annotations

import logging

import pytest

from morphserve.control import Plan
from morphserve.integration.worker.commands import Commands, Figures, KVUnknown
from quant_layers import StoreError

pytestmark = pytest.mark.cpu


class Rank:
    """Maps blocks in the background, and is done when a test says so."""

    def __init__(self) -> None:
        self.num_mapped = 10
        self.under_way = False

    def figures(self) -> Figures:
        return Figures(self.num_mapped, 700, 30)

    def commit(self) -> bool:
        self.under_way = True
        return True

    def outcome(self) -> bool:
        pending = self.under_way
        self.num_mapped, self.under_way = 20, False  # it ends the moment after it was asked
        return pending


def test_an_answer_that_is_not_pending_has_the_final_figures() -> None:
    """Guards: a rank that is done between two questions of one answer, whose new blocks would never be published."""
    rank, commands = Rank(), Commands()
    plan = Plan(3, (), 20)
    first = commands.answer(5, plan, rank.commit, rank.figures, final=True)
    assert (first.rank, first.ok, first.pending, first.num_kv_blocks) == (5, True, True, 10)
    again = commands.answer(5, plan, rank.outcome, rank.figures, again=True)
    assert again.pending
    rank.num_mapped = 10

    def done_before_it_is_asked() -> bool:
        rank.num_mapped = 20
        return False

    last = commands.answer(5, plan, done_before_it_is_asked, rank.figures, again=True)
    assert not last.pending and last.num_kv_blocks == 20


def test_a_plan_that_was_passed_is_refused() -> None:
    """Guards: a late command that undoes a newer one. A question about it is no command."""
    rank, commands = Rank(), Commands()
    assert commands.answer(0, Plan(4, (), 20), rank.commit, rank.figures, final=True).ok
    late = commands.answer(0, Plan(3, (), 5), rank.commit, rank.figures)
    assert not late.ok and "r3 came after r4" in late.error and not late.pending
    assert commands.answer(0, Plan(3, (), 5), rank.outcome, rank.figures, again=True).ok
    assert commands.answer(0, Plan(0, (), 20), rank.commit, rank.figures, final=True).ok, "revision 0 stands outside"


def test_what_there_was_no_memory_for_is_in_the_answer() -> None:
    """Guards: a warning in the engine that cannot say why, and one more by each rank, which can."""
    figures = Figures(4, 700, 30, short_of="no memory for 5 B")
    reply = Commands().answer(0, Plan(1, (), 5), lambda: None, lambda: figures)
    assert reply.ok and reply.error == "no memory for 5 B"


@pytest.mark.parametrize(("error", "kv_moved"), [(RuntimeError("no"), True), (KVUnknown("half"), False)])
def test_a_failure_is_an_answer(error: Exception, kv_moved: bool) -> None:
    """Guards: one rank's exception ends the engine, or copies that are half done pass for done."""

    def fail() -> bool:
        raise error

    reply = Commands().answer(0, Plan(1, (), 5), fail, Rank().figures)
    assert (reply.ok, reply.kv_moved, reply.pending) == (False, kv_moved, False)
    assert reply.error == f"{type(error).__name__}: {error}"


def test_a_plan_that_is_refused_has_moved_nothing() -> None:
    """Guards: blocks that have new names, of which a rank that has refused them says that it has copied the KV."""
    commands, rank = Commands(), Rank()
    commands.answer(0, Plan(3, (), 5), rank.commit, rank.figures, final=True)
    for copies, kv_moved in (((), True), (((7, 2),), False)):
        reply = commands.answer(0, Plan(2, (), 5, copies), rank.commit, rank.figures, final=True)
        assert (reply.ok, reply.kv_moved) == (False, kv_moved) and "refused" in reply.error


@pytest.mark.parametrize("error", [StoreError("PATH is damaged; delete it"), TimeoutError("the disk is away")])
def test_what_the_controller_says_whole_is_said_once(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a traceback for each attempt at a damaged file, beside the one warning that names it."""

    def fail() -> bool:
        raise error

    with caplog.at_level(logging.INFO):
        assert not Commands().answer(0, Plan(1, (), 5), fail, Rank().figures).ok
    assert not caplog.records
