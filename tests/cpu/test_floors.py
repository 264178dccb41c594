"""Requests that must not be served below a level of their own: who may, for how long, and that it holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cpu.sim_world import CALIBRATION, SERVER
from cpu.test_slo_parts import LIMITS, QUIET
from cpu.test_slo_rules import LADDER, crowded
from pydantic import ValidationError

from morphserve.config import MorphServeConfig, parse_config, parse_policy
from morphserve.control import EngineView, Monitor
from morphserve.errors import ConfigError
from morphserve.shipped import workload_file
from morphserve.tools.sim import Simulated, simulate
from morphserve.tools.workload import Slo, WorkloadSpec, load_workload
from policies import Decision, Floors, Order, Signals, SloConfig, StaticConfig, build_policy
from policies.config import FloorsConfig
from policies.floors import FloorPolicy
from policies.orders import obey

HARD = load_workload(WorkloadSpec(workload_file("hybB.jsonl")))
LADDER_SECTION = {
    "steps": [{"format": "w8", "layers_per_level": 30}, {"format": "w4", "layers_per_level": 10}],
    "expected_kl": {"w8": 0.0289, "w4": 0.3061},
}


class Wants:
    """A policy that wants one level, whatever it sees."""

    predictions = None

    def __init__(self, level: int) -> None:
        self.level = level

    def decide(self, signals: Signals) -> Decision:
        return Decision(self.level, "wanted", is_final=True)


def asked(policy: FloorPolicy, now_s: float, max_level: int | None) -> int:
    return policy.decide(replace(QUIET, now_s=now_s, max_level=max_level)).level


def test_no_deeper_while_they_are_here() -> None:
    """Guards: a burst that degrades requests which must not be; one that is held up for nobody."""
    policy = FloorPolicy(Wants(3), 60.0)
    assert [asked(policy, float(now), level) for now, level in enumerate((None, 0, 1, 3, None))] == [3, 0, 1, 3, 3]
    held, idle = (policy.decide(replace(QUIET, now_s=9.0, max_level=level)) for level in (0, None))
    assert not held.is_final and idle.is_final, "an engine without work sleeps, unless they have just held it"


def test_the_budget_is_of_time_in_which_a_deeper_level_is_wanted() -> None:
    """Guards: a budget spent by requests that hold up nothing, or never; one that swings when it is spent."""
    policy = FloorPolicy(Wants(1), 60.0)
    for second in range(1000):
        assert asked(policy, float(second), 1) == 1  # as deep as wanted: nothing is held up
    assert policy.budget.left_s == 60.0
    policy.inner = Wants(3)
    held = [asked(policy, 1000.0 + second, 1) for second in range(200)]
    spent = held.index(3)
    assert spent in range(60, 64) and held[spent:] == [3] * (200 - spent)
    assert asked(policy, 1000.0 + spent + 355, 1) == 3, "not before a tenth is back"
    assert asked(policy, 1000.0 + spent + 380, 1) == 1
    assert asked(FloorPolicy(Wants(3), 0.0), 0.0, 0) == 3, "no budget"


@pytest.mark.parametrize(
    ("order", "pays"),
    [
        (Order("pin", 0, "o"), False), (Order("pin", 3, "o"), False), (Order("max", 1, "o"), False),
        (Order("max", 2, "o"), True), (None, True),
    ],
)  # fmt: skip
def test_what_an_operator_orders_costs_them_nothing(order: Order | None, pays: bool) -> None:
    """Guards: an hour's seconds that are spent while an order holds the level, and are gone when it ends."""
    policy = FloorPolicy(Wants(3), 60.0)
    for second in range(20):
        policy.decide(replace(QUIET, now_s=float(second), max_level=1, order=order))
    assert (policy.budget.left_s < 60.0) is pays


def test_where_nobody_else_is_nobody_is_held_up() -> None:
    """Guards: requests that, once the budget is spent, are let in, taken for a load, and sent back, again and again."""
    for hold_s in (0.0, 60.0):
        policy = FloorPolicy(Wants(3), hold_s)
        for second in range(200):
            alone = replace(QUIET, now_s=float(second), max_level=0, max_level_alone=True)
            assert policy.decide(alone).level == 0
        assert policy.budget.left_s == hold_s


def test_those_that_would_wait_are_refused_where_they_are_not_to_wait() -> None:
    """Guards: requests that wait although the operator has them refused; a refusal of those that would be served, of
    any while seconds are left or nobody else is here, or for as long as an engine sleeps."""
    waits, refuses = (FloorPolicy(Wants(3), 10.0, is_refusing) for is_refusing in (False, True))
    floors: list[tuple[int, int]] = []
    for second in range(20):
        signals = replace(QUIET, now_s=float(second), max_level=0)
        floors.append((waits.decide(signals).min_floor, refuses.decide(signals).min_floor))
    spent = floors.index((0, 3))
    assert spent in range(10, 13) and set(floors[:spent]) == {(0, 0)} and set(floors[spent:]) == {(0, 3)}
    assert not refuses.decide(replace(QUIET, now_s=20.0)).is_final, "or an engine that falls asleep refuses for ever"
    alone = refuses.decide(replace(QUIET, now_s=21.0, max_level_alone=True))
    assert alone.min_floor == 0 and alone.is_final
    refuses.inner = Wants(0)
    assert refuses.decide(replace(QUIET, now_s=22.0)).min_floor == 0, "the load asks for nothing deeper"
    assert FloorPolicy(Wants(2), 0.0, True).decide(QUIET).min_floor == 2, "no budget"


def test_an_order_that_lifts_the_level_opens_the_door() -> None:
    """Guards: requests refused for a level that the load asks for and an operator does not allow."""
    refuses = FloorPolicy(Wants(3), 0.0, True)
    for kind, level, left in (("pin", 0, 0), ("max", 1, 1), ("max", 3, 3)):
        order = Order(kind, level, "an order")  # type: ignore[arg-type]
        assert obey(refuses.decide(QUIET), order, 3).min_floor == left


@pytest.mark.parametrize(
    ("section", "wish", "model", "level"),
    [
        ({}, 0, None, None),
        ({"shallowest": 0}, 0, None, 0),
        ({"shallowest": 0}, "8bit", None, 1),
        ({"shallowest": 0}, "0", None, 0),
        ({"shallowest": 0}, 1.0, None, 1),
        ({"shallowest": "8bit"}, 0, None, 1),
        ({"shallowest": 0}, None, None, None),
        ({"shallowest": 0}, "deepest", None, None),
        ({"models": {"a": 0}}, 0, None, None),
        ({"models": {"a": 0}}, 0, "a", 0),
        ({"shallowest": 0, "models": {"a": 2}}, 0, "a", 2),
        ({"shallowest": 1, "models": {"a": 0}}, 0, "b", 1),
    ],
)
def test_what_the_operator_allows(section: dict[str, Any], wish: object, model: str | None, level: int) -> None:
    """Guards: a client that holds the level up without leave, or shallower than it may; the same one when the API
    server is told."""
    floors = Floors.of(FloorsConfig.model_validate(section), LADDER)
    assert floors.level_of(wish, model) == level
    assert Floors.from_json(floors.as_json(), LADDER).level_of(wish, model) == level


def test_a_keys_level_goes_before_the_models() -> None:
    """Guards: an API key that is taken for another's, or that opens less than it should."""
    section = FloorsConfig.model_validate({"models": {"a": 2}, "keys": {"0123456789abcdef": 0}})
    floors = Floors.of(section, LADDER)
    known, other = "0123456789abcdef", "f" * 16
    assert [floors.level_of(0, model, known) for model in (None, "a")] == [0, 0]
    assert [floors.level_of(0, model, other) for model in (None, "a")] == [None, 2]
    with pytest.raises(ValidationError):
        FloorsConfig.model_validate({"keys": {"secret": 0}})


@pytest.mark.parametrize("section", ["shallowest: no", "models: {a: off}", "keys: {0123456789abcdef: false}"])
def test_no_is_not_level_0(section: str) -> None:
    """Guards: an operator who lets nobody ask, in the words that YAML has for it, lets everybody ask for everything."""
    with pytest.raises(ConfigError, match="floors"):
        parse_policy(f"policy: {{kind: slo, floors: {{{section}}}}}", "body")


@pytest.mark.parametrize("wish", ["w3", "", True, 0.5, float("nan"), float("inf"), -1, 99, [0], "9" * 5000])
def test_what_is_no_level_is_refused(wish: object) -> None:
    """Guards: an exception that ends the hooks at a client's choice, or nonsense taken for level 0."""
    with pytest.raises(ValueError, match="level"):
        Floors.of(FloorsConfig(shallowest=0), LADDER).level_of(wish, None)


def test_where_nobody_may_ask_the_policy_is_as_it_was() -> None:
    """Guards: another policy around that of everybody; an unknown level that only a client meets."""
    plain = build_policy(StaticConfig(kind="static", level=1), LADDER)
    assert not isinstance(plain, FloorPolicy) and plain.decide(QUIET).is_final
    config = SloConfig(kind="slo", floors=FloorsConfig(shallowest=0))
    policy = build_policy(config, LADDER, CALIBRATION.times, LIMITS)
    assert policy.decide(crowded()).level > 0
    assert policy.decide(replace(crowded(), now_s=101.0, max_level=0)).level == 0
    with pytest.raises(ValueError, match="level 9"):
        build_policy(SloConfig(kind="slo", floors=FloorsConfig(shallowest=9)), LADDER, CALIBRATION.times, LIMITS)


def test_the_monitor_knows_the_shallowest() -> None:
    """Guards: a request that has ended and still holds the level up, or one of several forgotten; others overlooked."""
    monitor, found = Monitor(), []
    for level, number in ((2, 1), (0, 1), (0, 1), (0, -1), (0, -1), (2, -1)):
        monitor.on_floor(level, number)
        found.append(monitor.snapshot(1.0, EngineView(0, 1, 0.0), 10, 3, 1, 1).max_level)
    assert found == [2, 0, 0, 0, 2, None]
    monitor.on_floor(0, 2)
    monitor.on_held("a")

    def alone(num_running: int) -> bool:
        return monitor.snapshot(1.0, EngineView(0, num_running, 0.0), 10, 3, 1, 1).max_level_alone

    assert [alone(number) for number in (0, 1, 2)] == [True, True, False]
    monitor.on_finish(0, 1.0, "a")
    monitor.on_floor(0, -1)
    assert [alone(number) for number in (1, 2)] == [True, False]


def run(share: float, hold_s: float, policy: str = "slo", when_spent: str = "wait", **server: Any) -> Simulated:
    floors = {"shallowest": 0, "hold_s": hold_s, "when_spent": when_spent}
    config: MorphServeConfig = parse_config({"ladder": LADDER_SECTION, "policy": {"kind": policy, "floors": floors}})
    every = round(1 / share) if share else 0
    return simulate(
        HARD, replace(SERVER, **server), config, CALIBRATION,
        asking=lambda index: 0 if every and index % every == 0 else None,
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["slo", "threshold"])
@pytest.mark.parametrize("hold_s", [0.0, 5.0, 3600.0])
@pytest.mark.parametrize("server", [{}, {"async_scheduling": True}, {"prefix_caching": True}])
def test_none_of_their_tokens_comes_from_a_deeper_level(policy: str, hold_s: float, server: dict[str, Any]) -> None:
    """Guards: the promise itself, through a burst, whatever the budget; and requests that are lost while they wait."""
    done = run(0.1, hold_s, policy, **server)
    assert max(done.levels) > (0 if hold_s < 3600 else -1)
    for request in done.requests:
        levels = {level for first, count in request.runs for level in done.levels[first : first + count]}
        assert request.max_level is None or levels <= {0}
        assert request.generated == request.output_tokens, f"{request.name} is lost"
    assert done.status is not None and not done.status["failed"]


@pytest.mark.parametrize("policy", ["slo", "threshold"])
def test_who_is_refused_is_told_at_once_and_the_others_are_served(policy: str) -> None:
    """Guards: a door that refuses nobody, everybody, or those that ask for nothing; one that stays shut after a
    burst; answers of those that were let in cut short."""
    done = run(0.1, 0.0, policy, "refuse")
    refused = {request.index for request in done.refused}
    asking = {request.index for request in done.requests if request.max_level is not None}
    assert refused and refused < asking
    assert all(r.generated == r.output_tokens for r in done.requests if r.index not in refused)
    assert max(asking - refused) > min(refused), "once the burst is over they are taken again"
    assert not run(0.1, 3600.0, policy, "refuse").refused, "as long as seconds are left"


def test_a_budget_bounds_what_they_cost_the_others() -> None:
    """Guards: a budget that changes nothing: held up for as long as it takes, or not at all."""

    def late(hold_s: float) -> int:
        done = run(0.1, hold_s)
        return sum(not Slo().good(o) for o, r in zip(done.outcomes, done.requests, strict=True) if r.max_level is None)

    assert late(0.0) < late(3600.0)
