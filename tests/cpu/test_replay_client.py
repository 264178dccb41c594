"""The open-loop client against a server that behaves, and one that does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer
from cpu.replay_fakes import FakeServer
from hypothesis import given
from hypothesis import strategies as st

from morphserve.tools.bench.load import client
from morphserve.tools.bench.load.client import ClientOptions, new_session, replay, sse_events
from morphserve.tools.workload.formats import TraceRequest
from morphserve.tools.workload.metrics import Slo, violations
from morphserve.tools.workload.outcome import Outcome, Replayed
from morphserve.tools.workload.workload import Workload

TestServer.__test__ = False  # type: ignore[attr-defined]  # not a test class, whatever its name says


def run(
    fake: FakeServer, arrivals: list[float], output_tokens: int = 3, **options: Any
) -> tuple[Replayed, list[Outcome]]:
    """Replay one request per arrival, prompts [i, i]; also what on_done saw."""
    workload = Workload("w", tuple(TraceRequest(at, 2, output_tokens) for at in arrivals), 512)
    done: list[Outcome] = []

    async def go() -> Replayed:
        async with TestServer(fake.app()) as server:
            client = ClientOptions(url=str(server.make_url("")).rstrip("/"), model="demo", **options)
            prompts = [[i, i] for i in range(len(arrivals))]
            return await replay(workload, prompts, client, time.perf_counter(), done.append)

    return asyncio.run(go()), done


def nth(**by_index: str) -> Callable[[dict[str, Any]], str]:
    """Behaviour by request, e.g. nth(r0="503")."""
    return lambda body: by_index.get(f"r{body['prompt'][0]}", "ok")


def test_answered_requests_are_counted_and_timed() -> None:
    """Guards the bookkeeping: tokens, chunks, times and text of a good answer."""
    replayed, done = run(FakeServer(), [0.0, 0.0], output_tokens=4, token_ids=True)
    for outcome in replayed.outcomes:
        assert outcome.ok
        assert (outcome.prompt_tokens, outcome.output_tokens, len(outcome.itls_s)) == (2, 4, 3)
        assert outcome.text == "w0 w1 w2 w3 "
        assert outcome.token_ids == [0, 1, 2, 3]
        assert outcome.latency_s == pytest.approx(outcome.ttft_s + sum(outcome.itls_s))
        assert outcome.tpot_s == pytest.approx(sum(outcome.itls_s) / 3)
        assert outcome.lag_s is not None and outcome.lag_s >= 0
    assert sorted(o.index for o in done) == [0, 1]
    ends = [o.ended_s for o in replayed.outcomes if o.ended_s is not None]
    first = min(o.sent_s for o in replayed.outcomes if o.sent_s is not None)
    assert replayed.duration_s == pytest.approx(max(ends) - first)


def test_request_asks_for_exactly_the_trace() -> None:
    """Guards the load: sampling, an early stop or a second tokenization would change every length."""
    fake = FakeServer()
    run(fake, [0.0], output_tokens=5)
    (body,) = fake.bodies
    assert body == {
        "model": "demo", "prompt": [0, 0], "max_tokens": 5, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_drawn_answers_bring_no_seed() -> None:
    """Guards: a server on a CPU that ends at a seeded request whose prompt takes two steps (vLLM 0.32)."""
    fake = FakeServer()
    run(fake, [0.0], temperature=0.7)
    (body,) = fake.bodies
    assert body["temperature"] == 0.7 and "seed" not in body


def test_what_a_server_thought_is_recorded() -> None:
    """Guards: probabilities of other tokens than those that were served, and levels that nobody asked for."""
    fake = FakeServer(morph=True)
    replayed, _ = run(fake, [0.0], output_tokens=3, top_logprobs=2)
    (outcome,), (body,) = replayed.outcomes, fake.bodies
    assert (body["logprobs"], body["return_tokens_as_token_ids"], body["return_token_ids"]) == (2, True, True)
    assert body["vllm_xargs"] == {"morphserve_receipt": "tokens"}
    assert outcome.top_logprobs == [{i: -0.5, i + 1: -1.5} for i in range(3)]
    assert outcome.token_ids == [0, 1, 2] and outcome.token_levels == [[0, 1], [1, 2]]


def test_client_is_open_loop() -> None:
    """Guards against a connection limit or a wait for answers: nobody is answered before all are here."""
    fake = FakeServer()
    fake.hold_until_in_flight = 150
    replayed, _ = run(fake, [0.0] * 150, cutoff_s=60)
    assert all(o.ok for o in replayed.outcomes)


def test_every_failure_is_a_violation_with_its_name() -> None:
    """Guards the violation rate: failures that drop out of it make a bad server look good."""
    behave = nth(r1="503", r2="short", r3="error_chunk", r4="garbage", r5="no_token")
    replayed, _ = run(FakeServer(behave), [0.0] * 6)
    assert [o.status for o in replayed.outcomes] == ["ok", "http_503", *["error"] * 4]
    words = ("", "queue is full", "1 of 3 tokens", "engine died", "JSONDecodeError", "without a token")
    for outcome, word in zip(replayed.outcomes, words, strict=True):
        assert word in outcome.error
    figures = violations(replayed.outcomes, Slo(60, 60))
    assert figures["violation_rate"] == pytest.approx(5 / 6)


def test_request_timeout_and_cut_off_end_what_hangs() -> None:
    """Guards against a run that never ends, and against losing the requests that hung from the count."""
    timed_out, _ = run(FakeServer(nth(r0="hang")), [0.0, 0.0], request_timeout_s=0.3, cutoff_s=60)
    assert [o.status for o in timed_out.outcomes] == ["timeout", "ok"]
    cut, _ = run(FakeServer(nth(r0="hang")), [0.0, 0.0], cutoff_s=0.5)
    assert [o.status for o in cut.outcomes] == ["cutoff", "ok"]
    assert cut.outcomes[0].ended_s is None
    assert violations(cut.outcomes, Slo(60, 60)) == {
        "sent": 2, "good": 1, "violation_rate": 0.5, "ttft_violation_rate": 0.5, "tpot_violation_rate": 0.5,
        "statuses": {"cutoff": 1, "ok": 1},
    }  # fmt: skip


def test_no_server_is_an_error_per_request() -> None:
    """Guards against one refused connection ending the whole run."""
    workload = Workload("w", (TraceRequest(0.0, 2, 3),) * 2, 512)
    options = ClientOptions(url="http://127.0.0.1:9", model="demo")
    replayed = asyncio.run(replay(workload, [[1], [2]], options, time.perf_counter()))
    assert [o.status for o in replayed.outcomes] == ["error", "error"]


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")).map(str.strip), max_size=8),
    st.lists(st.integers(0, 60), max_size=30),
    st.sampled_from(["\n\n", "\r\n\r\n"]),
)
def test_events_survive_any_cut_of_the_stream(payloads: list[str], cuts: list[int], end: str) -> None:
    """Guards the parser: the network cuts anywhere, also inside a character."""
    raw = end.join(f": comment{end}data: {p}" for p in payloads).encode()  # no line end after the last

    async def chunks() -> AsyncIterator[bytes]:
        rest = raw
        for cut in cuts:
            yield rest[:cut]
            rest = rest[cut:]
        yield rest

    async def collect() -> list[str]:
        return [event async for event in sse_events(chunks())]

    assert asyncio.run(collect()) == payloads


def test_no_client_keeps_a_connection_until_the_server_closes_it() -> None:
    """Guards: a demo that ends before it has measured anything, as a request was written into a connection that vLLM
    closed at that moment, which it does after 5 s."""

    async def kept_s() -> float:
        async with new_session() as session:
            return float(session.connector._keepalive_timeout)  # type: ignore[union-attr]

    assert asyncio.run(kept_s()) < 5
    bench = Path(client.__file__).parents[1]
    own = [file.name for file in bench.rglob("*.py") if "ClientSession(" in file.read_text(encoding="utf-8")]
    assert own == ["client.py"], "sessions are made by new_session"
