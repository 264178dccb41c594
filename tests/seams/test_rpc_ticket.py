"""One command, one answer, however often a rank that works in the background has to be asked."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from morphserve.control import Plan, Reply
from morphserve.integration.engine.executor import RpcExecutor

pytestmark = pytest.mark.cpu

PLAN = Plan(7, ((0, "w8"),), 40)


class Transport:
    """What vLLM's executor does with a collective call; the test says when it answers, and what."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Future[Any]]] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...] = (), non_block: bool = False) -> Future[Any]:
        assert non_block and args == (PLAN,)
        self.sent.append((method, Future()))
        return self.sent[-1][1]


def reply(rank: int, elapsed_s: float, **fields: Any) -> Reply:
    return Reply(rank, PLAN.revision, fields.pop("ok", True), elapsed_s=elapsed_s, **fields)


def test_a_rank_is_asked_until_it_is_done() -> None:
    """Guards: layers switched before they are there, blocks published before they have pages, or a rank asked by every
    poll, which fills the ring that steps travel in."""
    transport = Transport()
    executor = RpcExecutor(transport, 2, in_background=True)
    ticket = executor.prepare(PLAN)
    assert ticket.poll() is None and len(transport.sent) == 1
    transport.sent[0][1].set_result([reply(0, 0.1, pending=True), reply(1, 0.2)])
    for _ in range(3):
        assert ticket.poll() is None
    assert [method for method, _ in transport.sent] == ["morphserve_prepare", "morphserve_progress"]
    transport.sent[1][1].set_result([reply(0, 0.3, pending=True), reply(1, 0.0)])
    assert ticket.poll() is None and len(transport.sent) == 3
    transport.sent[2][1].set_result([reply(0, 0.0, num_kv_blocks=40), reply(1, 0.1, num_kv_blocks=39)])
    replies = ticket.poll()
    assert replies is not None and ticket.poll() == replies and len(transport.sent) == 3
    assert [r.num_kv_blocks for r in replies] == [40, 39], "figures of an answer before the last"
    assert [round(r.elapsed_s, 9) for r in replies] == [0.4, 0.3], "what steps stood still for it, all together"
    assert list(executor.pauses) == [0.3], "one for each command, its longest"


@pytest.mark.parametrize("asked", [0, 1])
def test_a_transport_that_fails_is_every_ranks_failure(asked: int) -> None:
    """Guards: the controller waits for ever for ranks that nobody reaches any more."""
    transport = Transport()
    ticket = RpcExecutor(transport, 2, in_background=True).commit(PLAN)
    if asked:
        transport.sent[0][1].set_result([reply(0, 0.0), reply(1, 0.0, pending=True)])
        assert ticket.poll() is None
    transport.sent[-1][1].set_exception(RuntimeError("ring is gone"))
    replies = ticket.poll()
    assert replies is not None
    assert [(r.rank, r.ok, r.error, r.kv_moved) for r in replies] == [
        (rank, False, "RuntimeError: ring is gone", False) for rank in (0, 1)
    ]


def test_a_failure_is_told_when_all_ranks_are_done() -> None:
    """Guards: an abort that overtakes another rank's work, or a failure that the last answer hides."""
    transport = Transport()
    ticket = RpcExecutor(transport, 2, in_background=True).prepare(PLAN)
    transport.sent[0][1].set_result([reply(0, 0.0, ok=False, error="no pages"), reply(1, 0.0, pending=True)])
    assert ticket.poll() is None
    # A rank whose work failed says so as often as it is asked (DeviceRank.outcome).
    transport.sent[1][1].set_result([reply(0, 0.0, ok=False, error="no pages"), reply(1, 0.0)])
    replies = ticket.poll()
    assert replies is not None and [r.ok for r in replies] == [False, True]


@pytest.mark.parametrize("command", ["prepare", "abort"])
def test_a_failure_that_a_rank_tells_once_is_kept(command: str) -> None:
    """Guards: a rank whose files are damaged says so, is asked again because another one still reads, and then has
    nothing to report: all are told to switch, and the engine ends."""
    transport = Transport()
    ticket = getattr(RpcExecutor(transport, 3), command)(PLAN)
    transport.sent[0][1].set_result(
        [reply(0, 0.1, ok=False, error="damaged", kv_moved=False), reply(1, 0.0, pending=True), reply(2, 0.0)]
    )
    assert ticket.poll() is None
    later = [reply(0, 0.2, num_kv_blocks=40), reply(1, 0.0, ok=False, error="late"), reply(2, 0.0)]
    transport.sent[1][1].set_result(later)
    replies = ticket.poll()
    assert replies is not None and len(transport.sent) == 2
    assert [(r.ok, r.error, r.kv_moved) for r in replies] == [
        (False, "damaged", False), (False, "late", True), (True, "", True),
    ]  # fmt: skip
    assert replies[0].num_kv_blocks == 40 and round(replies[0].elapsed_s, 9) == 0.3


def test_a_failed_commit_is_told_while_another_rank_is_at_work() -> None:
    """Guards: tokens of the steps that run meanwhile, on KV that one rank has moved by half or on ranks of two levels:
    they reach clients before anybody looks."""
    transport = Transport()
    ticket = RpcExecutor(transport, 2, in_background=True).commit(PLAN)
    transport.sent[0][1].set_result(
        [reply(0, 0.1, ok=False, error="half", kv_moved=False), reply(1, 0.0, pending=True, num_kv_blocks=50)]
    )
    replies = ticket.poll()
    assert replies is not None and ticket.poll() == replies and len(transport.sent) == 1
    assert [(r.ok, r.error, r.kv_moved) for r in replies] == [(False, "half", False), (True, "", True)]
