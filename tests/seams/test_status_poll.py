"""What an API server says of an engine that does not answer any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from seams.test_metrics import status

from morphserve.integration.server import metrics, poll, spare_time
from morphserve.integration.server.metrics import MorphServeEndpoint, StatusCollector
from morphserve.integration.server.poll import StatusPoll

pytestmark = pytest.mark.seams


class Engine:
    """One that answers until it hangs."""

    def __init__(self, max_queued_tokens: int | None = None) -> None:
        self.max_queued_tokens = max_queued_tokens
        self.goes_on: asyncio.Event | None = None  # while there is one it hangs
        self.num_asked = 0
        self.error: Exception | None = None

    async def call_utility_all_async(self, method: str) -> list[dict[str, Any]]:
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        if self.goes_on is not None:
            await self.goes_on.wait()
        return [{**status(0, 3), "max_queued_tokens": self.max_queued_tokens}]


class Door:
    """As far as vLLM's scheduler config says who is taken."""

    max_num_queued_tokens: int | None = None


class Clock:
    """Stands until it is moved."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the poll logs, by level; its waits are short, and there is no time between two questions."""
    lines: list[str] = []
    log = SimpleNamespace(
        warning=lambda text, *args: lines.append(f"WARNING {text % args}"),
        info=lambda text, *args: lines.append(f"INFO {text % args}"),
    )
    monkeypatch.setattr(poll, "logger", log)
    monkeypatch.setattr(poll, "POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(poll, "SILENT_AFTER_S", 0.05)
    monkeypatch.setattr(poll, "ANSWER_TIMEOUT_S", 0.05)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")  # so that nothing is added to this process' registry
    monkeypatch.setattr(metrics, "on_hangup", lambda ask, tasks: False)
    monkeypatch.setattr(spare_time, "idle_work", lambda config: None)
    return lines


async def until(holds: Callable[[], bool]) -> None:
    """Let the poll go on until it has got there, or the test has failed."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0)


def names(endpoint: MorphServeEndpoint) -> set[str]:
    registry = CollectorRegistry()
    registry.register(endpoint._collector)
    return {family.name for family in registry.collect()}


def test_an_engine_that_hangs_does_not_look_healthy(said: list[str]) -> None:
    """Guards: the last level and queue of an engine that hangs shown for hours as if they were of now, and requests
    refused for a limit that its policy set before it hung."""
    age = {"morphserve:status_age_seconds"}

    async def serve() -> None:
        engine, endpoint, clock = Engine(max_queued_tokens=300), MorphServeEndpoint(), Clock()
        endpoint._poll._clock = clock
        door = Door()
        client: Any = SimpleNamespace(engine_core=engine, scheduler_config=door, vllm_config=None)
        await endpoint.init_state(client, None, SimpleNamespace(api_key=None))
        for _ in range(2):
            await until(lambda: door.max_num_queued_tokens == 300)
            assert names(endpoint) > age
            (page,) = endpoint._poll.last
            assert page["exposure_level"] == 3 and endpoint._poll.age_s == 0.0
            engine.goes_on = asyncio.Event()
            await until(lambda: door.max_num_queued_tokens is None)
            clock.now_s += 40.0
            assert names(endpoint) == age and endpoint._poll.ages_s == {"0": 40.0}
            (page,) = endpoint._poll.last
            assert page["exposure_level"] == 3 and endpoint._poll.age_s == 40.0
            engine.goes_on.set()
            engine.goes_on = None
        await until(lambda: door.max_num_queued_tokens == 300)
        assert endpoint._tasks
        for task in endpoint._tasks:
            task.cancel()

    asyncio.run(serve())
    assert [line.split()[0] for line in said] == ["WARNING", "INFO"] * 2
    assert "no answer for" in said[0] and "answers again" in said[1]


def test_who_asks_does_not_lengthen_the_queue_of_an_engine_that_hangs() -> None:
    """Guards: each order leaves a question in an engine that answers none, and memory with it."""

    async def serve() -> None:
        engine, clock = Engine(), Clock()
        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"), clock)
        assert len(await asked.look()) == 1 and asked.age_s == 0.0
        engine.goes_on = asyncio.Event()
        task = asyncio.create_task(asked.run(lambda statuses: None))
        await until(lambda: engine.num_asked == 2)
        clock.now_s += poll.ANSWER_TIMEOUT_S + 1.0
        for _ in range(100):
            with pytest.raises(TimeoutError):
                await asked.look()
        assert engine.num_asked == 2 and asked.statuses and asked.age_s == poll.ANSWER_TIMEOUT_S + 1.0
        clock.now_s = poll.SILENT_AFTER_S + 1.0
        assert not asked.statuses, "before the poll itself has given up"
        task.cancel()

    asyncio.run(serve())


def test_a_silent_engine_is_asked_by_the_poll_alone(said: list[str]) -> None:
    """Guards: an engine for which the poll has given up, and has just asked once more, asked by each order as well."""

    async def serve() -> None:
        engine, told = Engine(), []
        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"))
        engine.goes_on = asyncio.Event()
        task = asyncio.create_task(asked.run(told.append))
        await until(lambda: bool(told))
        num_asked = engine.num_asked
        with pytest.raises(TimeoutError):
            await asked.look()
        assert engine.num_asked == num_asked
        task.cancel()

    asyncio.run(serve())


def test_figures_are_as_old_as_their_question() -> None:
    """Guards: an engine that takes ten seconds for each answer, whose figures look like those of now."""

    async def serve() -> None:
        engine, clock = Engine(), Clock()
        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"), clock)
        engine.goes_on = asyncio.Event()
        task = asyncio.create_task(asked.look())
        await until(lambda: engine.num_asked == 1)
        clock.now_s += 10.0
        engine.goes_on.set()
        await task
        assert asked.age_s == 10.0

    asyncio.run(serve())


def test_a_listener_that_fails_ends_no_poll(said: list[str]) -> None:
    """Guards: a status that stands still for good, since who is told of it has met an error once."""

    async def serve() -> None:
        engine, told = Engine(), []

        def fails(statuses: list[Any]) -> None:
            told.append(statuses)
            raise OSError("planted")

        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"))
        task = asyncio.create_task(asked.run(fails))
        await until(lambda: len(told) == 4)
        task.cancel()

    asyncio.run(serve())
    (line,) = said
    assert "OSError: planted" in line


def test_a_door_that_an_operator_has_shut_stays_shut(said: list[str]) -> None:
    """Guards: an engine that hangs while it drains, and whose requests are taken again for that."""

    async def serve() -> None:
        engine, endpoint = Engine(max_queued_tokens=0), MorphServeEndpoint()
        door, settings = Door(), SimpleNamespace(additional_config=None)
        client: Any = SimpleNamespace(engine_core=engine, scheduler_config=door, vllm_config=settings)
        await endpoint.init_state(client, None, None)
        await until(lambda: door.max_num_queued_tokens == 0)
        engine.goes_on = asyncio.Event()
        await until(lambda: bool(said))
        assert door.max_num_queued_tokens == 0
        assert endpoint._tasks
        for task in endpoint._tasks:
            task.cancel()

    asyncio.run(serve())


def test_an_engine_that_has_never_answered_has_no_figures(said: list[str]) -> None:
    """Guards: who asks waits for ever, or is told that the server runs without MorphServe."""

    async def serve() -> None:
        engine = Engine()
        engine.goes_on = asyncio.Event()
        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"))
        with pytest.raises(TimeoutError):
            await asked.look()
        assert asked.statuses == [] and asked.ages_s == {}, "nobody polls: of a server without an engine, too"

    asyncio.run(serve())


def test_an_engine_that_has_never_answered_grows_old() -> None:
    """Guards: no alert of an engine that has hung since its start."""

    async def serve() -> None:
        clock, engine = Clock(), Engine()
        clock.now_s = 100.0
        engine.goes_on = asyncio.Event()
        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"), clock)
        clock.now_s = 200.0  # the server starts
        task = asyncio.create_task(asked.run(lambda statuses: None))
        await until(lambda: engine.num_asked == 1)
        clock.now_s = 240.0
        assert asked.ages_s == {"unknown": 40.0} and asked.age_s == 40.0
        (family,) = StatusCollector(asked).collect()
        assert [(each.labels, each.value) for each in family.samples] == [({"engine": "unknown"}, 40.0)]
        engine.goes_on.set()
        await until(lambda: bool(asked.last))
        assert asked.ages_s == {"0": 40.0}  # as old as the question
        task.cancel()

    asyncio.run(serve())


@pytest.mark.parametrize("num_turns", range(1, 9))
def test_a_poll_ends_when_it_is_cancelled(said: list[str], num_turns: int) -> None:
    """Guards: a server that does not end, because the poll has missed its cancellation as an answer came in."""

    async def serve() -> None:
        engine = Engine()
        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"))
        task = asyncio.create_task(asked.run(lambda statuses: None))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert task.cancelled()

    asyncio.run(serve())


def test_an_engine_that_has_just_ended_is_no_news(said: list[str]) -> None:
    """Guards: a warning at every stop of a server, between its engine's end and the poll's."""

    async def serve() -> None:
        engine, told = Engine(), []
        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"))
        await asked.look()
        engine.error = RuntimeError("the engine is dead")
        task = asyncio.create_task(asked.run(told.append))
        await until(lambda: len(told) == 1)
        engine.error = None
        await until(lambda: len(told) == 2)
        assert not told[0] and told[1]
        task.cancel()

    asyncio.run(serve())
    assert said == []


def test_a_dead_engine_is_told_once(said: list[str]) -> None:
    """Guards: a poll that ends with the first error, or that writes a line twice a second until the server ends."""

    async def serve() -> None:
        engine, told = Engine(), []
        asked = StatusPoll(lambda: engine.call_utility_all_async("morphserve_status"))
        await asked.look()
        engine.error = RuntimeError("the engine is dead")
        task = asyncio.create_task(asked.run(told.append))
        await until(lambda: len(told) == 5)
        assert told == [[]] * 5 and asked.statuses == [] and [page["engine"] for page in asked.last] == [0]
        task.cancel()

    asyncio.run(serve())
    (line,) = said
    assert "RuntimeError: the engine is dead" in line
