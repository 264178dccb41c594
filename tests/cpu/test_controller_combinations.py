"""Orders, floors of requests and faults that meet in one transition: each with each, begun in each of its phases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product

import pytest

from morphserve.config import MorphServeConfig
from morphserve.control import Action, Health, Phase, Plan
from policies.floors import FloorPolicy
from tests.fakes import BASE_BLOCKS, Fail, Rig, ScriptedPolicy

pytestmark = pytest.mark.cpu

START = 3  # the level that all begin at, with requests in the tail; the policy wants 0
ORDERS: dict[str, tuple[Action, dict[str, object]] | None] = {
    "none": None,
    "pin 0": ("pin", {"level": 0, "for_s": 4}),
    "pin 5": ("pin", {"level": 5, "for_s": 4}),
    "max 1": ("max", {"level": 1, "for_s": 4}),
    "pause": ("pause", {"for_s": 4}),
    "restore": ("restore", {"for_s": 4}),
    "drain": ("drain", {"for_s": 4}),
}
FLOORS = {"none": (0, 1e9), "held": (1, 1e9), "spent": (1, 0.0)}  # requests that ask for level 1; seconds an hour
FAULTS: dict[str, Callable[[str, Plan], bool]] = {
    "none": lambda command, plan: False,
    "prepare": lambda command, plan: command in ("prepare", "alone"),
    "copies": lambda command, plan: bool(plan.copies) and command == "commit",
    "switch": lambda command, plan: bool(plan.layer_formats) and command == "commit",
    "short": lambda command, plan: False,
    "policy": lambda command, plan: False,
}
VOTED = (Phase.SHRINKING, Phase.PREPARING, Phase.ABORTING)  # phases that a rank which decides alone does not have
UNDONE = (Phase.ABORTING, Phase.REGROWING)


@dataclass(frozen=True)
class Case:
    """What meets, on so many ranks, and when it begins."""

    num_ranks: int
    phase: Phase
    order: str
    floor: str
    fault: str


def every_case() -> Iterator[Case]:
    for num_ranks, phase, order, floor, fault in product((1, 2), Phase, ORDERS, FLOORS, FAULTS):
        if num_ranks > 1 or phase not in VOTED:
            yield Case(num_ranks, phase, order, floor, fault)


class Meeting:
    """An engine in which all of a case meets."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.script = ScriptedPolicy()
        policy = FloorPolicy(self.script, FLOORS[case.floor][1])
        settings = {"transition": {"max_layers_per_step": 2, "backoff_s": 0.2}, "kv": {"migrate_blocks_per_step": 2}}
        self.rig = Rig(policy=policy, num_ranks=case.num_ranks, config=MorphServeConfig.model_validate(settings))
        self.is_asked = False  # not to be below the floor

    def step(self) -> None:
        """One step, looked back at before its tokens are read."""
        rig = self.rig
        rig.now_s += 0.05
        rig.tick()
        rig.executor.run_commands()
        rig.controller.look_back()
        if not rig.controller.lost:
            rig.executor.forward(rig.pool)
            rig.check()
            self.check()

    def check(self) -> None:
        """What an order or a floor has promised, between any two steps."""
        controller = self.rig.controller
        if controller.failed:
            return
        status = controller.status()
        held, wanted = status["orders"]["order"], status["wanted_level"]
        if held is not None and held["kind"] != "max":
            assert wanted == held["level"], self.case
        if held is not None and held["kind"] == "max":
            assert wanted <= held["level"], self.case
        if held is None and self.is_asked and self.case.floor == "held":
            assert wanted <= FLOORS["held"][0], self.case
        assert (controller.max_queued_tokens == 0) is (held is not None and held["kind"] == "drain")

    def begin(self) -> None:
        """Go to the phase, on the way back from the start."""
        rig, case = self.rig, self.case
        self.script.level = START
        for _ in range(60):
            self.step()
        assert rig.controller.level == START
        for request in range(3):
            assert rig.pool.allocate(request, 4)
        rig.executor.forward(rig.pool)
        if case.phase is Phase.IDLE:
            return
        if case.phase in UNDONE:
            rig.executor.fail = lambda command, plan, rank: "no" if command in ("prepare", "alone") else ""
        self.script.level = 0
        for _ in range(80):
            if rig.controller.phase is case.phase:
                return
            self.step()
        raise AssertionError(f"{case}: the phase was not reached")

    def meet(self) -> None:
        """Let it all happen at once, while requests come and go."""
        rig, case = self.rig, self.case
        rig.executor.fail = self.fail()
        if case.fault == "short":
            rig.executor.map_at_most = rig.pool.num_kv_blocks
        if case.fault == "policy":
            self.script.error = RuntimeError("planted")
        if (order := ORDERS[case.order]) is not None and not rig.controller.failed:
            revision = rig.controller.status()["orders"]["revision"]
            rig.controller.order(order[0], json.dumps({"revision": revision, **order[1]}), revision, False)
        if case.floor != "none":
            rig.monitor.on_floor(FLOORS[case.floor][0], 1)
            self.is_asked = True
        for number, wanted in enumerate((5, 0, 5, 0)):
            self.script.level = wanted
            for step in range(30):
                self.step()
                if step == 0 and not rig.controller.lost:
                    rig.pool.allocate(10 + number, min(3, len(rig.pool.free)))
                    rig.executor.forward(rig.pool)  # writes them, as the step that allocates does

    def fail(self) -> Fail:
        is_hit, rank_hit = FAULTS[self.case.fault], self.case.num_ranks - 1
        return lambda command, plan, rank: "planted" if rank == rank_hit and is_hit(command, plan) else ""

    def mend(self) -> None:
        """Take it all away: what is left must go back to where it all began."""
        rig = self.rig
        rig.executor.fail = lambda command, plan, rank: ""
        rig.executor.map_at_most = None
        if self.case.floor != "none":
            rig.monitor.on_floor(FLOORS[self.case.floor][0], -1)
            self.is_asked = False
        for request in list(rig.pool.held):
            rig.pool.finish(request)
        self.script.level = 0
        for _ in range(200):
            self.step()


def check_end(meeting: Meeting) -> None:
    """Nothing of it is left: no fence, no staged byte, no order, no wake-up; level 0, unless morphing has ended."""
    rig, case = meeting.rig, meeting.case
    controller = rig.controller
    switched = any(plan.layer_formats for command, plan in rig.executor.sent if command == "commit")
    if controller.lost:
        assert case.fault == "switch" and switched and case.num_ranks > 1, case
        return
    assert controller.phase is Phase.IDLE and rig.pool.fence is None, case
    assert all(ledger["staging"] == 0 for ledger in rig.ledgers), case
    assert rig.executor.num_undrained == 0 and not controller.wants_wakeup and not controller.in_transition, case
    assert controller.health is (Health.RESTING if case.fault == "policy" else Health.RUNNING), case
    if controller.failed:
        assert controller.max_queued_tokens is None and controller.level_ahead == controller.effective_level, case
        return
    assert controller.level == controller.effective_level == 0 and rig.pool.num_kv_blocks == BASE_BLOCKS, case
    orders = controller.status()["orders"]
    assert orders["order"] is None and controller.max_queued_tokens is None, case
    for ledger, rank in zip(rig.ledgers, rig.ranks, strict=True):
        assert ledger["weights"] == rank.weight(rig.ladder[0].layer_formats), case
    counted = controller.counters.orders
    assert sum(counted.values()) == (0 if case.order == "none" else 2), (case, counted)


def run(case: Case) -> None:
    meeting = Meeting(case)
    meeting.begin()
    meeting.meet()
    meeting.mend()
    check_end(meeting)


def test_nothing_is_left_of_what_met() -> None:
    """Guards: an order, a floor or a fault that outlives itself, breaks a promise of another, or ends what could go
    on. Of all cases each so-many-th, by a number that none of the factors has; tests/stress/check_combinations.py takes
    every one."""
    for case in islice(every_case(), 0, None, 23):
        run(case)
