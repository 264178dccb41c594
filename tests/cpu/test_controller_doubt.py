"""A rank that fails to do what cannot fail: what is in doubt then is computed again, or the engine ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest

from morphserve.config import MorphServeConfig
from morphserve.control import Health, Phase, Plan, Reply
from morphserve.control.doubt import Doubt
from morphserve.control.ranks import RankFigures, ReplyTracker
from morphserve.control.runner import SwapRunner
from tests.fakes import FakeRank, Rig
from tests.rank_rules import FakeTicket

pytestmark = pytest.mark.cpu

COPIED = "what was in the KV cache is computed again"


def live_at_level_3(num_ranks: int = 2, **config: object) -> Rig:
    """Requests in the tail that a restore must move, at level 3."""
    settings = {"transition": {"max_layers_per_step": 2}, **config}
    rig = Rig(num_ranks=num_ranks, config=MorphServeConfig.model_validate(settings))
    rig.go_to(3)
    for request in range(3):
        assert rig.pool.allocate(request, 4)
    rig.step()
    return rig


def step(rig: Rig) -> bool:
    """One step as an engine makes it: look back before its tokens are read. False = the engine has ended."""
    rig.now_s += 0.05
    rig.tick()
    rig.executor.run_commands()
    rig.controller.look_back()
    if not rig.controller.lost:
        rig.executor.forward(rig.pool)  # asserts that every live block has its content, on all ranks
        rig.check()
    return not rig.controller.lost


def until(rig: Rig, done: Callable[[], bool], steps: int = 60) -> None:
    for _ in range(steps):
        if done() or not step(rig):
            return
    raise AssertionError(rig.controller.status())


def fails(rig: Rig, command: str, *, rank: int, copies: bool | None = None, shrinks: bool | None = None) -> None:
    """From now on this rank does not carry out such commands."""

    def fail(sent: str, plan: Plan, index: int) -> str:
        is_it = sent == command and index == rank
        is_it &= copies is None or bool(plan.copies) is copies
        is_it &= shrinks is None or (plan.num_kv_blocks < rig.executor.ranks[index].mapped) is shrinks
        return "planted" if is_it else ""

    rig.executor.fail = fail


def recovers(rig: Rig) -> None:
    """With the fault gone the restore is tried again, and arrives."""
    rig.executor.fail = lambda command, plan, rank: ""
    rig.script.level = rig.controller.level
    for request in range(10, 12):
        rig.pool.allocate(request, 3)
    rig.step()
    rig.script.level = 0
    rig.step(120)
    assert rig.controller.level == 0 and rig.controller.phase is Phase.IDLE and not rig.controller.failed


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shrinks", [False, True])
def test_kv_that_a_rank_may_have_moved_by_half_is_computed_again(
    rank: int, shrinks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: answers from the wrong blocks after copies failed on one rank, alone or together with the unmapping; or
    a server that never morphs again because of it."""
    rig = live_at_level_3(kv={"migrate_blocks_per_step": 2 if not shrinks else 256})
    blocks, num_sent = rig.pool.num_kv_blocks, len(rig.executor.sent)
    fails(rig, "commit", rank=rank, copies=True, shrinks=shrinks)
    rig.script.level = 2
    with caplog.at_level(logging.WARNING):
        until(rig, lambda: ("restore", "aborted") in rig.controller.counters.transitions)
    assert rig.pool.num_discards == 1 and sorted(rig.pool.preempted) == [0, 1, 2]
    assert shrinks or all(plan.num_kv_blocks == blocks for _, plan in rig.executor.sent[num_sent:]), "unmapped, too"
    assert rig.controller.health is Health.RUNNING and rig.controller.level == 3
    assert rig.controller.counters.errors == {"kv_unknown": 1}
    assert rig.pool.num_kv_blocks == blocks == rig.ledgers.num_kv_blocks
    (said,) = caplog.records
    assert f"rank {rank}: planted" in said.getMessage() and COPIED in said.getMessage()
    recovers(rig)


@pytest.mark.parametrize("rank", [0, 1])
def test_kv_that_all_have_moved_whole_is_kept(rank: int) -> None:
    """Guards: all that runs computed again where a rank has copied everything and then could not unmap."""
    rig = live_at_level_3()
    blocks, obey = rig.pool.num_kv_blocks, rig.executor._obey

    def keeps_memory(command: str, plan: Plan, of: FakeRank) -> Reply:
        if command != "commit" or of.index != rank or plan.num_kv_blocks >= of.mapped:
            return obey(command, plan, of)
        return replace(obey(command, replace(plan, num_kv_blocks=of.mapped), of), ok=False, error="MADV_DONTNEED")

    rig.executor._obey = keeps_memory  # type: ignore[method-assign]
    rig.script.level = 2
    until(rig, lambda: ("restore", "aborted") in rig.controller.counters.transitions)
    assert rig.pool.num_discards == 0 and not rig.pool.preempted
    assert rig.controller.health is Health.RUNNING and rig.controller.counters.errors == {"prepare": 1}
    assert rig.pool.num_kv_blocks == blocks == rig.ledgers.num_kv_blocks
    rig.executor._obey = obey  # type: ignore[method-assign]
    recovers(rig)


def test_copies_of_a_drain_that_was_given_up_count_too(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: the answer to copies that comes when nothing is under way any more is looked at by nobody."""
    rig = live_at_level_3(kv={"migrate_blocks_per_step": 2})
    fails(rig, "commit", rank=1, copies=True)
    rig.script.level = 2
    rig.now_s += 0.05
    rig.tick()
    assert rig.controller.phase is Phase.DRAINING
    rig.script.level = 3
    rig.tick()
    assert rig.controller.phase is Phase.IDLE
    rig.executor.run_commands()
    with caplog.at_level(logging.WARNING):
        assert step(rig)
    assert rig.pool.num_discards == 1 and rig.controller.counters.errors == {"kv_unknown": 1}
    assert [COPIED in record.getMessage() for record in caplog.records] == [True]
    recovers(rig)


def test_nothing_is_unmapped_before_all_have_copied() -> None:
    """Guards: a step under way that reads blocks that are gone, on a rank that has yet to copy what lived there."""
    rig = live_at_level_3(kv={"migrate_blocks_per_step": 4})
    blocks, num_sent = rig.pool.num_kv_blocks, len(rig.executor.sent)
    rig.script.level = 2
    for _ in range(4):  # in which no rank answers
        rig.now_s += 0.05
        rig.tick()
    assert rig.controller.phase is Phase.DRAINING and len(rig.executor.sent) > num_sent
    assert all(plan.copies and plan.num_kv_blocks == blocks for _, plan in rig.executor.sent[num_sent:])
    rig.executor.run_commands()
    rig.tick()
    assert rig.controller.phase is Phase.SHRINKING, "all had been moved: it was the answers that were waited for"


def test_copies_that_fail_one_after_the_other_are_one_fault() -> None:
    """Guards: requests that are computed again once more for copies that were given up with the rest."""
    rig = live_at_level_3(kv={"migrate_blocks_per_step": 2})
    fails(rig, "commit", rank=1, copies=True)
    rig.script.level = 2
    for _ in range(3):
        rig.now_s += 0.05
        rig.tick()
    assert len(rig.controller._runner.replies.copies) > 1
    for _ in range(4):
        assert step(rig)
    assert rig.pool.num_discards == 1 and rig.controller.counters.errors == {"kv_unknown": 1}
    assert not rig.executor.num_undrained, "taken off the ring all the same"


def test_who_is_lost_looks_at_nothing_more() -> None:
    """Guards: requests preempted, and more errors told, by a controller that ends the engine, once more of a rank's
    answers have come."""
    rig = live_at_level_3(kv={"migrate_blocks_per_step": 2})
    obey = rig.executor._obey

    def lose(command: str, plan: Plan, rank: FakeRank) -> Reply:
        reply = obey(command, plan, rank)
        return replace(reply, ok=False, error="gone", weight_bytes=0) if plan.copies else reply

    rig.executor._obey = lose  # type: ignore[method-assign]
    rig.script.level = 2
    for _ in range(3):
        rig.tick()
    rig.executor.run_commands()
    for _ in range(3):
        rig.controller.look_back()
        rig.tick()
    assert rig.controller.health is Health.LOST and rig.controller.counters.errors == {"ranks_unknown": 1}
    assert not rig.pool.num_discards


def test_a_lone_rank_that_has_moved_blocks_by_half_goes_on() -> None:
    """Guards: an engine that ends, or that serves from the wrong blocks, where its one rank has changed no layer."""
    rig = live_at_level_3(num_ranks=1)
    obey = rig.executor._obey

    def half_done(command: str, plan: Plan, rank: FakeRank) -> Reply:
        if command != "alone":
            return obey(command, plan, rank)
        figures = {"num_kv_blocks": rank.mapped, "weight_bytes": rig.executor._weight_bytes(rank)}
        return Reply(0, plan.revision, False, "table", kv_moved=False, **figures)

    rig.executor._obey = half_done  # type: ignore[method-assign]
    rig.script.level = 2
    until(rig, lambda: ("restore", "aborted") in rig.controller.counters.transitions)
    assert rig.pool.num_discards == 1 and rig.controller.counters.errors == {"kv_unknown": 1}
    assert rig.controller.level == rig.controller.effective_level == 3 and rig.ledger["staging"] == 0
    rig.executor._obey = obey  # type: ignore[method-assign]
    recovers(rig)


@pytest.mark.parametrize("kv_moved", [False, True])
def test_a_lone_rank_that_stops_after_the_switch_ends_the_engine(kv_moved: bool) -> None:
    """Guards: layers that are not what anybody counts them for, behind KV that was thrown away for nothing, or kept."""
    rig = live_at_level_3(num_ranks=1)
    obey = rig.executor._obey

    def half_done(command: str, plan: Plan, rank: FakeRank) -> Reply:
        reply = obey(command, plan, rank)
        return replace(reply, ok=False, error="table", kv_moved=kv_moved) if command == "alone" else reply

    rig.executor._obey = half_done  # type: ignore[method-assign]
    rig.script.level = 0
    until(rig, lambda: False)
    assert rig.controller.health is Health.LOST and not rig.pool.num_discards


@pytest.mark.parametrize(("start", "target"), [(0, 1), (3, 0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_its_commit_ends_the_engine(rank: int, start: int, target: int) -> None:
    """Guards: ranks at other levels than each other serve on; their step is read; they are sent more; or nobody is
    told why."""
    rig = Rig()
    rig.go_to(start)
    sent = len(rig.executor.sent)

    def fail(command: str, plan: Plan, index: int) -> str:
        return "lost" if command == "commit" and plan.layer_formats and index == rank else ""

    rig.executor.fail = fail
    rig.script.level = target
    until(rig, lambda: False)
    controller = rig.controller
    assert controller.lost == f"COMMITTING at level {start}: rank {rank}: lost"
    assert controller.health is Health.LOST and not controller.wants_wakeup and not controller.in_transition
    assert controller.counters.errors == {"ranks_unknown": 1}
    direction = "degrade" if target > start else "restore"
    assert controller.counters.transitions[(direction, "aborted")] == 1
    assert controller.status()["recent_transitions"][0]["error"] == f"rank {rank}: lost"
    num_sent = len(rig.executor.sent)
    assert rig.executor.sent[num_sent - 1][0] == "commit" and num_sent > sent
    for _ in range(3):
        rig.tick()
        controller.look_back()
    assert len(rig.executor.sent) == num_sent and controller.counters.errors == {"ranks_unknown": 1}


def test_ranks_that_differ_are_met_before_their_step_is_read() -> None:
    """Guards: the tokens of the step that ran on ranks of two levels reach a client before the next step begins."""
    rig = Rig()
    rig.executor.fail = lambda command, plan, rank: "lost" if command == "commit" and rank else ""
    rig.script.level = 1
    for _ in range(10):
        rig.tick()
        assert not rig.controller.lost
        rig.executor.run_commands()
        rig.controller.look_back()
        if rig.executor.ranks[0].formats != rig.executor.ranks[1].formats:
            assert rig.controller.lost
            return
    raise AssertionError("no rank has switched")


def test_a_look_back_takes_no_vote() -> None:
    """Guards: a failed prepare, which is allowed, is taken for the end, or is lost to the tick that counts votes."""
    rig = Rig()
    rig.executor.fail = lambda command, plan, rank: "no memory" if command == "prepare" and rank else ""
    rig.script.level = 1
    for _ in range(8):
        rig.now_s += 0.05
        rig.tick()
        rig.executor.run_commands()
        num_sent = len(rig.executor.sent)
        rig.controller.look_back()
        assert len(rig.executor.sent) == num_sent, "commands go with the next step"
    assert rig.controller.counters.errors == {"prepare": 1} and rig.controller.health is Health.RUNNING


@pytest.mark.parametrize("figures", [{"num_kv_blocks": 0}, {"weight_bytes": 0}])
def test_kv_alone_must_be_in_doubt(figures: dict[str, int]) -> None:
    """Guards: KV is thrown away and serving goes on where weights or mapped blocks of a rank are unknown as well."""
    rig = live_at_level_3()
    obey = rig.executor._obey

    def lose(command: str, plan: Plan, rank: FakeRank) -> Reply:
        reply = obey(command, plan, rank)
        return replace(reply, ok=False, error="gone", kv_moved=False, **figures) if plan.copies else reply

    rig.executor._obey = lose  # type: ignore[method-assign]
    rig.script.level = 2
    until(rig, lambda: False)
    assert "gone" in rig.controller.lost and not rig.pool.num_discards


def test_a_rank_is_held_against_its_own_last_word() -> None:
    """Guards: an engine that ends because what the ledger counts is a bound; and a rank of which nobody has heard yet
    whose weights are taken for right, whatever they are."""
    rig = Rig()
    judge = Doubt(rig.pool, rig.ledgers, ReplyTracker())
    booked = rig.ledgers[0]["weights"]
    said = Reply(0, 1, False, "planted", num_kv_blocks=rig.pool.num_kv_blocks, weight_bytes=booked)
    assert judge.is_sound((said,)) and not judge.is_sound((replace(said, weight_bytes=booked - 8),))
    judge.replies.before[0] = RankFigures(said.num_kv_blocks, booked - 8, 0)
    assert judge.is_sound((replace(said, weight_bytes=booked - 8),)) and not judge.is_sound((said,))


def test_kv_that_cannot_be_thrown_away_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a session that sleeps on unknown KV goes on from it."""
    rig = live_at_level_3()

    def held() -> None:
        raise RuntimeError("a block is held")

    monkeypatch.setattr(rig.pool, "discard_contents", held)
    fails(rig, "commit", rank=0, copies=True)
    rig.script.level = 2
    until(rig, lambda: False)
    assert "planted" in rig.controller.lost and "a block is held" in rig.controller.lost


@pytest.mark.parametrize("method", ["advance_shrink", "finish_shrink", "commit"])
def test_an_error_of_ours_among_moved_blocks_has_all_computed_again(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: blocks that have new names, whose KV no rank was told to copy, are read under them."""
    rig = live_at_level_3()
    original = getattr(rig.executor if method == "commit" else rig.pool, method)

    def broken(*args: object) -> None:
        if method == "advance_shrink":
            original(*args)  # renames, and then fails
        raise RuntimeError(method)

    monkeypatch.setattr(rig.executor if method == "commit" else rig.pool, method, broken)
    rig.script.level = 2
    for _ in range(6):
        assert step(rig)
    assert rig.pool.num_discards == 1 and rig.controller.health is Health.DEAD
    assert rig.controller.counters.errors == {"controller": 1}


def test_moved_blocks_that_cannot_be_thrown_away_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the same, where throwing away what they hold fails too."""
    rig = live_at_level_3()

    def broken(*args: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(rig.pool, "finish_shrink", broken)
    monkeypatch.setattr(rig.pool, "discard_contents", broken)
    rig.script.level = 2
    until(rig, lambda: False)
    assert rig.controller.health is Health.LOST and "planted" in rig.controller.lost


@pytest.mark.parametrize("command", ["abort", "commit"])
def test_what_is_served_from_is_known_where_forgetting_or_regrowing_fails(command: str) -> None:
    """Guards: an engine that ends although all its ranks have the weights and the blocks that are served from."""
    rig = live_at_level_3()
    shrunk = rig.ladder[2].num_kv_blocks

    def fail(sent: str, plan: Plan, rank: int) -> str:
        if sent == "prepare":
            return "no memory"
        regrows = sent == "commit" and not plan.copies and plan.num_kv_blocks > shrunk
        return "planted" if rank == 1 and sent == command and (sent == "abort" or regrows) else ""

    rig.executor.fail = fail
    rig.executor.map_at_most = 10**6  # ranks may now differ in blocks that are not published
    rig.script.level = 2
    for _ in range(12):
        assert step(rig)
    assert rig.controller.health is Health.DEAD and rig.controller.counters.errors == {"controller": 1}
    assert rig.controller.level == 3 and not rig.pool.num_discards


@pytest.mark.parametrize("figures", [{"num_kv_blocks": 0}, {"weight_bytes": 0}])
@pytest.mark.parametrize("phase", [Phase.SHRINKING, Phase.ABORTING, Phase.REGROWING])
@pytest.mark.parametrize("is_dead", [False, True])
def test_what_is_served_from_must_be_known_where_what_cannot_fail_does(
    is_dead: bool, phase: Phase, figures: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a rank that has lost weights, or blocks that are served, while it was to forget or to map, is served
    from on; also where an error of ours has come in between."""
    rig = live_at_level_3()
    obey = rig.executor._obey

    def lose(command: str, plan: Plan, rank: FakeRank) -> Reply:
        reply = obey(command, plan, rank)
        is_it = rig.controller.phase is phase and rank.index == 1
        return replace(reply, ok=False, error="gone", **figures) if is_it else reply

    rig.executor._obey = lose  # type: ignore[method-assign]
    rig.executor.fail = lambda command, plan, rank: "no memory" if command == "prepare" else ""
    rig.script.level = 2
    for _ in range(20):
        rig.now_s += 0.05
        rig.tick()
        if rig.controller.phase is phase:
            break
        rig.executor.run_commands()
        rig.controller.look_back()
    assert rig.controller.phase is phase
    if is_dead:
        monkeypatch.setattr(SwapRunner, "advance", lambda *args: 1 // 0)
        rig.tick()
        assert rig.controller.health is Health.DEAD
    until(rig, lambda: False)
    assert rig.controller.health is Health.LOST and "gone" in rig.controller.lost


def test_blocks_that_a_rank_has_not_mapped_end_the_engine() -> None:
    """Guards: a rank that says yes to a switch, and has fewer blocks than are published, is served from on."""
    rig = Rig()
    obey = rig.executor._obey

    def forgets(command: str, plan: Plan, rank: FakeRank) -> Reply:
        reply = obey(command, plan, rank)
        is_it = command == "commit" and plan.layer_formats and rank.index == 1
        return replace(reply, num_kv_blocks=rig.pool.num_kv_blocks - 1) if is_it else reply

    rig.executor._obey = forgets  # type: ignore[method-assign]
    rig.script.level = 1
    until(rig, lambda: False)
    assert rig.controller.health is Health.LOST and "are published" in rig.controller.lost


def test_no_swap_batch_begins_while_copies_are_on_their_way() -> None:
    """Guards: layers that switch above KV of which nobody knows yet whether it was copied."""
    rig = live_at_level_3(kv={"migrate_blocks_per_step": 2})
    rig.script.level = 2
    rig.tick()
    for level in (3, 4, 4):
        rig.script.level = level
        num_sent = len(rig.executor.sent)
        rig.tick()
        assert len(rig.executor.sent) == num_sent and rig.controller.phase is Phase.IDLE
    rig.executor.run_commands()
    rig.tick()
    assert rig.executor.sent[-1][0] == "prepare"


def test_copies_that_fail_after_an_error_of_ours_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a controller that has died of something else leaves the KV that a rank moved by half to be read."""
    rig = live_at_level_3(kv={"migrate_blocks_per_step": 2})
    fails(rig, "commit", rank=1, copies=True)
    for level in (2, 3):
        rig.script.level = level
        rig.tick()
    monkeypatch.setattr(SwapRunner, "grow_again", lambda *args, **more: 1 // 0)
    rig.tick()
    assert rig.controller.health is Health.DEAD and not rig.pool.num_discards
    rig.executor.run_commands()
    rig.controller.look_back()
    assert rig.pool.num_discards == 1 and rig.controller.health is Health.DEAD


def test_an_error_of_ours_leaves_nothing_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the memory of layers that nobody will switch to, kept for good; and answers that come late left on the
    ring, which has ten places."""
    rig = Rig()
    rig.script.level = 1
    rig.tick()
    assert rig.controller.phase is Phase.PREPARING
    monkeypatch.setattr(SwapRunner, "advance", lambda *args: 1 // 0)
    rig.tick()
    assert rig.controller.health is Health.DEAD and rig.executor.sent[-1][0] == "abort"
    rig.executor.run_commands()
    rig.controller.look_back()
    assert not any(rank.staged for rank in rig.executor.ranks)
    assert not rig.controller._runner.replies.late


@pytest.mark.parametrize("same_bytes", [True, False])
def test_a_commit_that_fails_after_an_error_of_ours_is_looked_at(
    same_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a controller that has died of something else takes the news that ranks differ off the ring unread; also
    where layers weigh as much in their new format."""
    rig = Rig()
    if same_bytes:
        rig.executor._weight_bytes = lambda rank: 0  # type: ignore[method-assign]
    rig.executor.fail = lambda command, plan, rank: "lost" if command == "commit" and rank else ""
    rig.script.level = 1
    while rig.controller.phase is not Phase.COMMITTING:
        rig.tick()
        if rig.controller.phase is not Phase.COMMITTING:
            rig.executor.run_commands()
    monkeypatch.setattr(SwapRunner, "advance", lambda *args: 1 // 0)
    rig.tick()
    assert rig.controller.health is Health.DEAD
    rig.executor.run_commands()
    rig.controller.look_back()
    assert rig.controller.health is Health.LOST and "rank 1: lost" in rig.controller.lost


def test_an_error_of_the_transport_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: asking for answers raises, and vLLM's step ends with it."""
    rig = Rig()
    rig.script.level = 1
    while rig.controller.phase is not Phase.COMMITTING:
        rig.tick()
        if rig.controller.phase is not Phase.COMMITTING:
            rig.executor.run_commands()
    monkeypatch.setattr(FakeTicket, "poll", lambda self: 1 // 0)
    rig.controller.look_back()
    assert rig.controller.health is Health.DEAD
    rig.controller.look_back()
    rig.tick()
    assert rig.controller.counters.errors == {"controller": 1, "drain_replies": 2}
