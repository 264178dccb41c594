"""Streaming-input sessions: vLLM adds a request again under its id, turn after turn, and ends it by a last addition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from seams.async_world import World
from seams.test_async_scheduler import model as model  # noqa: F401  a fixture

from morphserve.integration.engine.requests.receipts import PRECISION_ARG, RECEIPT_ARG

pytestmark = pytest.mark.seams

TURN = [1, 2, 3, 4, 5]
TPOT = {"morphserve_tpot_s": 1e-9}


def ended(world: World, name: str, turns: int) -> list[Any]:
    """Step until so many turns of this session have ended; their last outputs."""
    for _ in range(60):
        world.step()
        last = [one for one in world.outputs if one.request_id == name and one.finish_reason is not None]
        if len(last) >= turns:
            return last
    raise AssertionError("the turn did not end")


def nothing_is_left(world: World) -> bool:
    """Whether our books know no request any more."""
    morph, monitor = world.morph, world.morph.monitor
    return not (
        morph.receipts._drafts
        or morph.receipts._begun
        or morph._between_turns
        or morph.provenance._demanding
        or morph.traffic.late._first_token_s
        or morph.traffic._awaiting_first_token
        or morph.traffic._arrived_s
        or monitor._waiting.cohorts()
        or world.signals().running_limits
    )


@pytest.mark.parametrize("at_once", [False, True])
def test_a_session_leaves_nothing_behind(model: Path, at_once: bool) -> None:  # noqa: F811
    """Guards: the addition that ends a session is booked as a request that waits for ever, and asks for a receipt; a
    turn that was sent while the one before it ran is booked as waiting while it runs."""
    world = World(model, 1)
    asks = {RECEIPT_ARG: 1, PRECISION_ARG: "full", **TPOT}
    world.add("s", TURN, 6, session=True, **asks)
    if not at_once:
        ended(world, "s", 1)
        assert not world.signals().waiting and not world.signals().running_limits
        assert (world.signals().num_waiting, world.signals().num_running) == (0, 0)  # it waits for its client
    world.add("s", [7, 8], 6, session=True, **asks)
    if not at_once:
        ended(world, "s", 2)
    world.end_session("s")
    if at_once:
        ended(world, "s", 2)
    for _ in range(4):
        world.step()
    assert not world.scheduler.requests and nothing_is_left(world)
    late = world.morph.traffic.late.as_json(0.0)
    assert late["num_ended"] == 2, "each turn is an answer"
    assert world.signals().num_arrivals == 2


def test_each_turn_is_judged_by_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Guards: the time that a session waits for its client makes its answer late, or early its next one."""
    world = World(model, 1)
    clock = [1000.0]
    monkeypatch.setattr("morphserve.integration.engine.requests.traffic.time.time", lambda: clock[0])
    limits = {"morphserve_ttft_s": 5.0, "morphserve_tpot_s": 5.0}
    world.add("s", TURN, 4, session=True, arrival_s=999.0, **limits)
    ended(world, "s", 1)
    clock[0] = 2000.0
    world.add("s", [7], 4, session=True, arrival_s=1999.0, **limits)
    (waiting,) = world.signals().waiting
    assert waiting.num_tokens == 1, "what it goes on from is computed"
    ended(world, "s", 2)
    clock[0] = 3000.0
    world.end_session("s")
    world.step()
    late = world.morph.traffic.late.as_json(3000.0)
    assert (late["num_ended"], late["num_judged"], late["num_late"]) == (2, 2, 0)


def test_a_turn_says_what_its_context_came_from(model: Path) -> None:  # noqa: F811
    """Guards: a turn at level 0 that is called full precision, over a context that quantized layers computed; counts
    of one turn in the next; or a turn without a receipt."""
    world = World(model, 1)
    world.policy.level = 2
    for _ in range(20):
        world.step()
    assert world.morph.controller.level == 2
    world.add("asked", TURN, 5, session=True, **{RECEIPT_ARG: 1})
    world.add("later", [9, *TURN], 5, session=True)
    ended(world, "asked", 1), ended(world, "later", 1)
    world.policy.level = 0
    for _ in range(40):
        world.step()
    assert world.morph.controller.level == 0
    for name in ("asked", "later"):
        world.add(name, [6, 6], 3, session=True, **{RECEIPT_ARG: 1})
    first, second = (one.kv_transfer_params["morphserve"] for one in ended(world, "asked", 2))
    assert first["output_tokens"] == {"2": 5} and first["computed_tokens"].keys() == {"2"}
    assert second["output_tokens"] == {"0": 3} and second["computed_tokens"].keys() == {"0", "2"}
    assert not second["full_precision"] and second["deepest_level"] == 2
    without, later = (one.kv_transfer_params for one in ended(world, "later", 2))
    assert without is None
    assert later["morphserve"]["reused_tokens"].keys() == {"2"} and not later["morphserve"]["full_precision"]


def test_an_aborted_turn_ends_once(model: Path) -> None:  # noqa: F811
    """Guards: a client that goes away in mid-turn or between two turns is counted twice, or never."""
    world = World(model, 1)
    world.add("running", TURN, 30, session=True)
    world.add("waiting", TURN, 3, session=True)
    ended(world, "waiting", 1)
    world.abort("running")
    world.abort("waiting")
    world.step()
    assert nothing_is_left(world) and world.morph.traffic.late.as_json(0.0)["num_ended"] == 2


def test_kv_of_a_sleeping_session_cannot_be_thrown_away(model: Path) -> None:  # noqa: F811
    """Guards: a session that goes on from KV in the wrong blocks, because it did not run when they were found out."""
    world = World(model, 1)
    world.add("s", TURN, 4, session=True)
    ended(world, "s", 1)
    with pytest.raises(RuntimeError, match="Failed to reset KV cache"):
        world.morph.pool.discard_contents()
