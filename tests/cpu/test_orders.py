"""An operator's orders: what is taken, what is refused, how long one holds, and that it is an input of the decision."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from cpu.log_world import LIMITS

from morphserve.control import DecisionLog, Phase, make_header, parse_order
from morphserve.control.decisions.orders import ORDERS, OrderBook
from morphserve.control.decisions.replay_log import replay
from morphserve.control.health import Counters
from morphserve.errors import OrderError
from policies import Decision, Order, PolicySetup, SloConfig, SloPolicy, StaticConfig, ThresholdConfig, ask
from policies.orders import obey
from policies.slo.limits import QualityBudget
from tests.fakes import Rig

pytestmark = pytest.mark.cpu


def revision_of(rig: Rig) -> int:
    return int(rig.controller.status()["orders"]["revision"])


def give(rig: Rig, action: Any, revision: int | None = None, is_rehearsal: bool = False, **body: Any) -> int:
    """Order something of who has looked just before; returns the revision that it named."""
    named = revision_of(rig) if revision is None else revision
    rig.controller.order(action, json.dumps({"revision": named, **body}), named, is_rehearsal)
    return named


def order_of(rig: Rig) -> dict[str, Any] | None:
    order: dict[str, Any] | None = rig.controller.status()["orders"]["order"]
    return order


# ---- the decision


@pytest.mark.parametrize(
    ("order", "asked", "max_level", "level"),
    [
        (None, 4, 6, 4),
        (Order("pin", 2, "o"), 4, 6, 2),
        (Order("pin", 5, "o"), 4, 6, 5),
        (Order("pin", 5, "o"), 4, 3, 3),
        (Order("max", 2, "o"), 4, 6, 2),
        (Order("max", 5, "o"), 4, 6, 4),
        (Order("max", 4, "o"), 4, 6, 4),
        (Order("restore", 0, "o"), 4, 6, 0),
        (Order("pause", 3, "o"), 0, 6, 3),
        (Order("drain", 0, "o"), 4, 6, 0),
    ],
)
def test_an_answer_keeps_to_the_order(order: Order | None, asked: int, max_level: int, level: int) -> None:
    """Guards: an order that the policy overrules, or one that overrules the bounds of the policy."""
    answer = Decision(asked, "because", 700)
    kept = obey(answer, order, max_level)
    assert kept.level == level
    assert kept.max_queued_tokens == 700
    if level == asked and (order is None or order.kind == "max"):
        assert kept is answer
    else:
        assert kept.reason.startswith("o")
    if level == 3 and max_level == 3:
        assert kept.reason == "o; the policy allows level 3"


def test_a_spent_quality_budget_is_no_operators_to_spend() -> None:
    """Guards: a pin that goes on degrading once the hour's quality is spent, which the settings forbid."""
    rig = Rig()
    policy = PolicySetup(SloConfig(kind="slo"), None, LIMITS).build(rig.ladder)
    assert isinstance(policy, SloPolicy) and policy.max_level == len(rig.ladder) - 1
    policy.budget = QualityBudget(1.0)
    policy.budget.update(0.0, 100, 1.0)
    assert policy.max_level == 0
    bounded = PolicySetup(SloConfig(kind="slo", max_level=2), None, LIMITS).build(rig.ladder)
    assert bounded.max_level == 2
    assert PolicySetup(ThresholdConfig(kind="threshold", max_level=1)).build(rig.ladder).max_level == 1
    assert PolicySetup(StaticConfig(kind="static")).build(rig.ladder).max_level == len(rig.ladder) - 1


# ---- in the controller


def test_a_pin_holds_for_so_long_and_then_the_policy_decides() -> None:
    """Guards: a pin that a policy overrules, that a restart alone ends, or at whose end nobody asks the policy."""
    rig = Rig()
    rig.script.level = 1
    rig.step(20)
    give(rig, "pin", level=4, for_s=10)
    rig.step(100)  # 5 s
    assert rig.controller.level == 4 and rig.script.seen is not None and rig.script.seen.order is not None
    order = order_of(rig)
    assert order is not None and (order["kind"], order["level"]) == ("pin", 4) and 4.9 < order["left_s"] < 5.1
    ranks = {tuple(rank.formats) for rank in rig.executor.ranks}
    assert ranks == {rig.ladder[4].layer_formats}, "by the controller's own plans, to every rank"
    rig.step(99)
    assert rig.controller.level == 4
    rig.step(40)
    assert rig.controller.level == 1 and order_of(rig) is None
    assert rig.controller.counters.orders == {"pin_taken": 1, "pin_expired": 1}


def test_an_idle_engine_takes_an_order_and_its_end() -> None:
    """Guards: a pin that waits for the next request, an hour later; an engine that keeps a core busy all the pin long;
    one that stays at the pin's level once it has ended, because nobody makes steps."""
    rig = Rig()
    rig.step()
    assert not rig.controller.wants_wakeup
    give(rig, "pin", level=3, for_s=100)
    assert rig.controller.wants_wakeup
    rig.step(40)
    assert rig.controller.level == 3 and not rig.controller.wants_wakeup
    rig.now_s += 99.0
    assert rig.controller.wants_wakeup, "the end is news"
    rig.step(40)
    assert rig.controller.level == 0 and not rig.controller.wants_wakeup


def test_a_maximum_bounds_and_does_not_lead() -> None:
    """Guards: a maximum that degrades an idle server, or that the next burst breaks."""
    rig = Rig()
    give(rig, "max", level=2, for_s=60)
    rig.step(20)
    assert rig.controller.level == 0
    rig.script.level = 6
    rig.step(40)
    assert rig.controller.level == 2 and "order 1: max level 2" in rig.controller.status()["reason"]
    rig.script.level = 1
    rig.step(40)
    assert rig.controller.level == 1
    give(rig, "resume")
    rig.script.level = 6
    rig.step(60)
    assert rig.controller.level == 6


def test_a_restore_ends_with_level_0() -> None:
    """Guards: "restore now" that keeps a server from its burst for a minute, or that gives up on the way."""
    rig = Rig()
    rig.go_to(5)
    give(rig, "restore")
    while order_of(rig) is not None:
        rig.step()
    assert rig.controller.effective_level == 0 and rig.controller.counters.orders["restore_reached"] == 1
    rig.step(60)
    assert rig.controller.level == 5, "its policy decides again"


def test_a_restore_without_room_is_given_up() -> None:
    """Guards: an order without an end, on an engine that is full for hours."""
    rig = Rig()
    rig.go_to(3)
    assert rig.pool.allocate(1, rig.pool.num_kv_blocks - 1)
    rig.step()
    give(rig, "restore", for_s=5)
    rig.step(110)
    assert order_of(rig) is None and rig.controller.counters.orders["restore_expired"] == 1


@pytest.mark.parametrize("steps", range(0, 8))
def test_a_pause_lets_what_is_under_way_end(steps: int) -> None:
    """Guards: a pause in mid-transition that leaves the engine between two levels, or turns it around."""
    rig = Rig()
    rig.script.level = 4
    rig.step(steps)
    target = rig.controller.target_level
    give(rig, "pause")
    rig.script.level = 6
    rig.step(60)
    assert rig.controller.level == target and rig.controller.phase is Phase.IDLE
    assert not any(key[1] == "cancelled" for key in rig.controller.counters.transitions)
    rig.now_s += 86_400
    rig.step(10)
    assert rig.controller.level == target, "until somebody resumes"
    give(rig, "resume")
    rig.step(60)
    assert rig.controller.level == 6


def test_a_drain_closes_the_door_before_the_next_step() -> None:
    """Guards: a server that is told to drain takes requests on; one whose door stays shut after it."""
    rig = Rig()
    rig.go_to(4)
    give(rig, "drain", cause="kernel update")
    assert rig.controller.max_queued_tokens == 0 == rig.controller.status()["max_queued_tokens"]
    rig.step(60)
    assert rig.controller.level == 0 and rig.controller.max_queued_tokens == 0
    give(rig, "resume")
    assert rig.controller.max_queued_tokens is None, "open at once, too"


def test_an_order_takes_the_place_of_the_one_before() -> None:
    """Guards: two orders that fight, or an end of the first that ends the second."""
    rig = Rig()
    give(rig, "pin", level=5, for_s=2)
    rig.step(20)
    give(rig, "pin", level=2, for_s=20)
    rig.step(100)
    assert rig.controller.level == 2 and rig.controller.counters.orders == {"pin_taken": 2}


def test_a_policy_that_is_replaced_bounds_the_pin_in_force() -> None:
    """Guards: an edited max_level that a pin of before goes on to break."""
    rig = Rig()
    give(rig, "pin", level=5, for_s=100)
    rig.step(60)
    setup = PolicySetup(ThresholdConfig(kind="threshold", max_level=2))
    rig.controller.replace_policy(setup.build(rig.ladder), "edited", setup)
    rig.step(60)
    assert rig.controller.level == 2 and "the policy allows level 2" in rig.controller.status()["reason"]


# ---- who may order what


def test_a_passed_revision_orders_nothing() -> None:
    """Guards: a request that is sent twice; an operator who overrules what he has not seen, or what has ended since."""
    rig = Rig()
    first = give(rig, "pin", level=1, for_s=10)
    for stale in (first, first - 1, first + 2, 0):
        with pytest.raises(OrderError, match="has passed") as refused:
            give(rig, "pin", revision=stale, level=2, for_s=10)
        assert refused.value.outcome == "stale"
    before = revision_of(rig)
    rig.step(250)  # the pin ends by itself
    with pytest.raises(OrderError, match="has passed"):
        give(rig, "resume", revision=before)
    give(rig, "pin", level=2, for_s=10)
    rig.step(40)
    assert rig.controller.level == 2 and rig.controller.counters.orders["pin_refused"] == 4


def test_a_request_of_before_a_restart_orders_nothing() -> None:
    """Guards: a revision that begins at 0 again, or where it began before, by a clock that was set back: what was
    recorded yesterday is an order of today."""
    body, seen = parse_order("resume", '{"revision": 1}'), set()
    for _ in range(30):
        book = OrderBook(Rig().ladder, Counters(), lambda: 0.0)
        for _ in range(100):
            seen.add(book.revision)
            book.take("resume", body, 0)
    assert len(seen) == 3000 and max(seen) < 2**49, "the sum of several must be a number in every JSON"


def test_a_rehearsal_changes_nothing() -> None:
    """Guards: one of two replicas has taken what the other refuses."""
    rig = Rig()
    named = give(rig, "pin", is_rehearsal=True, level=3, for_s=10)
    assert revision_of(rig) == named and order_of(rig) is None and not rig.controller.wants_wakeup
    with pytest.raises(OrderError):
        give(rig, "pin", is_rehearsal=True, level=33, for_s=10)


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (4, "level 4 is beyond level 2"),
        ("deepest", "level 6 is beyond level 2"),
        (7, "not on the ladder"),
        ("w3", "no level of that"),
    ],
)
def test_a_level_beyond_the_bounds_is_refused_in_one_line(level: Any, words: str) -> None:
    """Guards: a pin that breaks max_level or the quality bound, which cuts the ladder; a traceback for a typo."""
    rig = Rig(policy=PolicySetup(ThresholdConfig(kind="threshold", max_level=2)).build(Rig().ladder))
    with pytest.raises(OrderError) as refused:
        give(rig, "pin", level=level, for_s=10)
    said = str(refused.value)
    assert refused.value.outcome == "refused" and words in said and "\n" not in said
    assert order_of(rig) is None
    give(rig, "pin", level=2, for_s=10)


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("pin", '{"revision": 1, "level": 2}'),
        ("pin", '{"revision": 1, "for_s": 2}'),
        ("pin", '{"level": 1, "for_s": 2}'),
        ("pin", '{"revision": 1, "level": 2, "for_s": 0}'),
        ("pin", '{"revision": 1, "level": 2, "for_s": 86401}'),
        ("pin", '{"revision": 1, "level": 2, "for_s": NaN}'),
        ("pin", '{"revision": 1, "level": true, "for_s": 1}'),
        ("pin", '{"revision": 1, "level": -1, "for_s": 1}'),
        ("pin", '{"revision": 1, "level": 1e400, "for_s": 1}'),
        ("pin", '{"revision": true, "level": 1, "for_s": 1}'),
        ("pin", '{"revision": 1, "level": "' + "x" * 41 + '", "for_s": 1}'),
        ("pin", '{"revision": 1, "level": 1, "for_s": 1, "force": true}'),
        ("resume", '{"revision": 1, "for_s": 1}'),
        ("pause", '{"revision": 1, "level": 1}'),
        ("drain", '{"revision": 1, "cause": "two\\nlines"}'),
        ("drain", '{"revision": 1, "cause": "\\u001b[2J"}'),
        ("drain", '{"revision": 1, "cause": "' + "x" * 201 + '"}'),
        ("drain", '{"revision": 1, "cause": {"a": 1}}'),
        ("drain", "[" * 4000),
        ("drain", '{"revision": ' * 300),
        ("drain", ""),
        ("drain", "revision: 1"),
        ("drain", "[]"),
    ],
)
def test_a_body_that_is_none_is_refused_in_one_line(action: Any, body: str) -> None:
    """Guards: an order without an end, a line of one's own in the server's log, a body that keeps an engine busy."""
    with pytest.raises(OrderError) as refused:
        parse_order(action, body)
    said = str(refused.value)
    assert "\n" not in said and len(said) <= 300 and said.startswith(action)


def test_every_order_is_in_the_log_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a level that nobody can explain the day after."""
    rig = Rig()
    with caplog.at_level(logging.INFO):
        for action in ORDERS:
            body: dict[str, Any] = {"level": 1, "for_s": 9} if action in ("pin", "max") else {}
            give(rig, action, cause=f"because of {action}", **body)
        with pytest.raises(OrderError):
            give(rig, "pin", revision=0, level=1, for_s=9)
    said = [record.getMessage() for record in caplog.records]
    for number, action in enumerate(ORDERS, start=1):
        (line,) = [line for line in said if line.endswith(f"(because of {action})")]
        assert line.startswith(f"morph: order {number}: {action}")
    assert any(line.startswith("morph: an order is refused") for line in said)
    assert rig.controller.counters.orders == {**{f"{action}_taken": 1 for action in ORDERS}, "pin_refused": 1}


def test_a_controller_that_gave_up_takes_no_order() -> None:
    """Guards: "ok" for a level that the engine will never be at."""
    rig = Rig()
    rig.script.error = RuntimeError("planted")
    rig.step()
    with pytest.raises(OrderError, match="gave up") as refused:
        give(rig, "pin", level=1, for_s=1)
    assert refused.value.outcome == "failed"


def test_a_decision_log_with_orders_replays(tmp_path: Path) -> None:
    """Guards: an order that no log knows, so that its decisions are taken for a policy that has changed its mind."""
    path = tmp_path / "log"
    setup = PolicySetup(ThresholdConfig(kind="threshold"), None, LIMITS)
    log = DecisionLog(path, make_header(setup, Rig().ladder))
    rig = Rig(policy=setup.build(Rig().ladder), log=log)
    rig.pool.allocate(1, 18)
    timed = {"pin": {"level": 1, "for_s": 1}, "max": {"level": 0, "for_s": 9}}
    for action in ("pin", "max", "drain", "resume"):
        give(rig, action, **timed.get(action, {}))
        rig.step(30)
    log.close()
    found = replay(path)
    assert found.agrees and found.compared == 120 and len(found.logged_levels) > 1, found
    assert '"kind":"drain"' in path.read_text()


def test_the_policy_is_asked_under_an_order_too() -> None:
    """Guards: a policy that wakes up after a pin, and believes that the burst of before goes on."""
    rig = Rig()
    give(rig, "pin", level=2, for_s=100)
    rig.step(3)
    assert rig.script.seen is not None and rig.script.seen.now_s == rig.now_s
    assert ask(rig.script, rig.script.seen).level == 2
