"""Open-loop client: every request leaves at its time, whatever became of those before it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from morphserve.tools.checks import at_least, between
from morphserve.tools.options import option
from morphserve.tools.workload import ERROR, OK, TIMEOUT, Outcome, Replayed, Workload

# vLLM's server closes a connection that is idle for 5 s (uvicorn's default). A client that was kept from running
# at that moment would send its next request into it, and count a violation that the server knows nothing of.
_KEEP_ALIVE_S = 2.0


def new_session(timeout: aiohttp.ClientTimeout | None = None) -> aiohttp.ClientSession:
    """Return a session of as many connections as there are requests: a limit would turn an open loop closed."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
    return aiohttp.ClientSession(
        connector=connector, timeout=timeout or aiohttp.ClientTimeout(total=None, sock_connect=30)
    )


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How requests are sent."""

    url: str  # http://host:port, without /v1
    model: str  # name the server knows the model by
    request_timeout_s: float = option(
        "give up on one request after this", default=300.0, flag="--request-timeout", metavar="S"
    )
    # What is unfinished then counts as violated.
    cutoff_s: float = option(
        "end a run this long after its last arrival; default: 120, with --fit by the machine",
        default=120.0,
        flag="--cutoff",
        unset=True,
        metavar="S",
    )
    token_ids: bool = option("record the ids of the generated tokens (vLLM servers only)", default=False)
    top_logprobs: int = option(
        "record the K most probable tokens at each position, and the level it was computed at, for `morphserve "
        "served-kl`; servers are slower for it (vLLM servers only)",
        default=0,
        type=at_least(1),
        metavar="K",
    )
    temperature: float = option(
        "draw the tokens of answers at this temperature, as most users do; default: 0, the most probable token",
        default=0.0,
        type=between(0.0, 100.0),
        metavar="T",
    )


async def replay(
    workload: Workload,
    prompts: Sequence[list[int]],
    options: ClientOptions,
    started: float,
    on_done: Callable[[Outcome], None] = lambda _: None,
) -> Replayed:
    """Send the whole workload once.

    Args:
        prompts: token ids, one list per request.
        started: perf_counter reading that is the workload's 0 s.
        on_done: called in the event loop as each request ends.
    """
    outcomes = [Outcome(i, r.arrival_s, r.input_tokens, r.output_tokens) for i, r in enumerate(workload.requests)]
    async with new_session() as session:

        async def one(outcome: Outcome) -> None:
            await asyncio.sleep(max(0.0, outcome.scheduled_s - (time.perf_counter() - started)))
            body = completion_body(options, prompts[outcome.index], outcome.asked_tokens)
            body["temperature"] = options.temperature
            await send(session, options, body, outcome, started)
            on_done(outcome)

        tasks = [asyncio.create_task(one(o)) for o in outcomes]
        try:
            remaining_s = started + workload.span_s + options.cutoff_s - time.perf_counter()
            await asyncio.wait(tasks, timeout=max(0.0, remaining_s))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        ended = time.perf_counter()
    return Replayed(outcomes, started, _duration_s(outcomes, ended - started))


def completion_body(options: ClientOptions, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """Return the body of one /v1/completions request: greedy, exactly `max_tokens` long."""
    body: dict[str, Any] = {
        "model": options.model,
        "prompt": prompt,  # ids: no second tokenization that could change the length
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.token_ids or options.top_logprobs:
        body["return_token_ids"] = True
    if options.top_logprobs:
        body |= {"logprobs": options.top_logprobs, "return_tokens_as_token_ids": True}
        body["vllm_xargs"] = {"morphserve_receipt": "tokens"}  # means nothing to a server without the plugin
    return body


async def send(
    session: aiohttp.ClientSession,
    options: ClientOptions,
    body: dict[str, Any],
    outcome: Outcome,
    zero: float,
) -> None:
    """Send one request and fill in its outcome; only a cancellation gets out."""
    begin = time.perf_counter()
    outcome.sent_s = begin - zero
    try:
        async with asyncio.timeout(options.request_timeout_s):
            async with session.post(f"{options.url}/v1/completions", json=body) as response:
                if response.status == 200:
                    await _read_stream(response, outcome, begin)
                else:
                    outcome.status = f"http_{response.status}"
                    outcome.error = (await response.text())[:500]
    except TimeoutError:
        outcome.status = TIMEOUT
        outcome.error = f"no complete answer within {options.request_timeout_s:g} s"
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as e:
        outcome.status = ERROR
        outcome.error = f"{type(e).__name__}: {e}"
    outcome.ended_s = time.perf_counter() - zero


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome, begin: float) -> None:
    """Time the chunks the way `vllm bench serve` does: chunks with `choices` count, nothing else."""
    last = begin
    async for event in sse_events(response.content.iter_any()):
        if event == "[DONE]":
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            raise ValueError(f"server sent {json.dumps(chunk['error'])[:300]}")
        if choices := chunk.get("choices"):
            now = time.perf_counter()
            if last == begin:
                outcome.ttft_s = now - begin
            else:
                outcome.itls_s.append(now - last)
            last = now
            outcome.latency_s = now - begin
            outcome.text += choices[0].get("text") or ""
            outcome.token_ids += choices[0].get("token_ids") or []
            outcome.top_logprobs += map(_by_id, (choices[0].get("logprobs") or {}).get("top_logprobs") or ())
        if receipt := chunk.get("morphserve"):
            outcome.token_levels = receipt.get("token_levels") or []
        if usage := chunk.get("usage"):
            outcome.output_tokens = int(usage.get("completion_tokens") or 0)
            outcome.prompt_tokens = int(usage.get("prompt_tokens") or outcome.prompt_tokens)
    if last == begin:
        raise ValueError("the stream ended without a token")
    outcome.output_tokens = outcome.output_tokens or 1 + len(outcome.itls_s)
    if outcome.output_tokens < outcome.asked_tokens:
        raise ValueError(
            f"the stream ended after {outcome.output_tokens} of {outcome.asked_tokens} tokens "
            "(ignore_eos not obeyed, or the answer was cut)"
        )
    outcome.status = OK


def _by_id(position: dict[str, float] | None) -> dict[int, float]:
    """Read `{"token_id:7": -0.5, ...}`."""
    return {int(name.rpartition(":")[2]): logprob for name, logprob in (position or {}).items()}


async def sse_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yield the `data:` payloads of a server-sent event stream, however the network cut it up."""
    pending = b""
    async for chunk in chunks:
        pending += chunk
        *lines, pending = pending.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8")
    if pending.startswith(b"data:"):
        yield pending[5:].strip().decode("utf-8")


def _duration_s(outcomes: Sequence[Outcome], elapsed_s: float) -> float:
    sent = [o for o in outcomes if o.sent_s is not None]
    if not sent:
        return elapsed_s
    first = min(o.sent_s for o in sent if o.sent_s is not None)
    if any(o.ended_s is None for o in sent):
        return elapsed_s - first
    return max(max(o.ended_s or 0.0 for o in sent) - first, 1e-9)
