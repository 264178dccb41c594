"""Traffic while something breaks: a square wave of streaming clients, and canaries whose tokens are known.

Clients ask one request after the other while the wave is up, and none while it is down. Canaries ask all the time, the
same few prompts, greedily, and with a receipt: an answer of which every token comes from level 0 must be the stock
server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from morphserve.tools.bench import ClientOptions, completion_body, send
from morphserve.tools.workload import Outcome

NUM_CLIENTS, NUM_CANARIES = 14, 2
ON_S, OFF_S = 8.0, 6.0
CANARY_TOKENS = 24
# Nats between the two most probable tokens that no rounding takes away. A batch of another shape adds up in another
# order; a logit of 32 to 64 is then the next bfloat16, 0.25 away, and so may the other be. Twice that.
CLEAR_MARGIN = 1.0
REQUEST_TIMEOUT_S = 300.0  # on a machine that others use, too; what is lost never comes
_RECEIPT = {"morphserve_receipt": 1}
_PAUSE_S = 0.2  # of a client that was refused, before it asks again


@dataclass(slots=True)
class CanaryAnswer:
    """What a canary was told. Levels: of every token that the answer depends on; None = no receipt came."""

    prompt: int
    tokens: tuple[int, ...] = ()
    levels: frozenset[int] | None = None
    status: str = "error"
    is_mixed: bool = False  # with requests for an adapter, which stock vLLM 0.32 on a CPU then gives to everybody
    is_clear: bool = False  # no rounding changes any of its tokens; False = margins were not asked for


@dataclass(slots=True)
class Traffic:
    """All that was asked, and what came of it. Times are perf_counter's, in seconds."""

    outcomes: list[Outcome] = field(default_factory=list)
    canaries: list[CanaryAnswer] = field(default_factory=list)
    zero: float = field(default_factory=time.perf_counter)
    num_mixings: int = 0  # begun and ended: odd while one lasts

    def begin(self, num_prompt: int, num_tokens: int) -> Outcome:
        """Note a request that is about to be sent."""
        outcome = Outcome(len(self.outcomes), time.perf_counter() - self.zero, num_prompt, num_tokens)
        self.outcomes.append(outcome)
        return outcome

    @contextlib.contextmanager
    def mixing(self) -> Iterator[None]:
        """Note that requests for an adapter are asked in the block."""
        self.num_mixings += 1
        try:
            yield
        finally:
            self.num_mixings += 1


def canary_prompts(seed: int = 0, count: int = 4, period: int = 6, num_tokens: int = 36) -> list[list[int]]:
    """Return the canaries' prompts, as token ids: a few drawn ones, over and over.

    A model goes on with what repeats, and is sure of it. What follows drawn tokens alone is a guess: the two most
    probable tokens of some position are next to equal in all of them, and rounding chooses.
    """
    draw = random.Random(seed)
    return [([draw.randrange(100, 5000) for _ in range(period)] * num_tokens)[:num_tokens] for _ in range(count)]


async def ask_canary(
    session: aiohttp.ClientSession, options: ClientOptions, prompt: int, with_margins: bool = False
) -> CanaryAnswer:
    """Send one canary and read its tokens, its receipt and, where asked for, whether it is clear."""
    body = completion_body(options, canary_prompts()[prompt], CANARY_TOKENS) | {
        "stream": False, "return_token_ids": True, "vllm_xargs": _RECEIPT,
    }  # fmt: skip
    if with_margins:
        body["logprobs"] = 2
    del body["stream_options"]
    answer = CanaryAnswer(prompt)
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S), session.post(f"{options.url}/v1/completions", json=body) as got:
            if got.status == 200:
                document = await got.json()
                answer.tokens = tuple(document["choices"][0]["token_ids"])
                answer.levels = _levels(document.get("kv_transfer_params"))
                if with_margins:
                    answer.is_clear = _is_clear(document["choices"][0]["logprobs"]["top_logprobs"])
                answer.status = "ok"
            else:
                answer.status = f"http_{got.status}"
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as e:
        answer.status = f"error: {type(e).__name__}"
    return answer


def _is_clear(top_logprobs: Sequence[Mapping[str, float]]) -> bool:
    """Return whether the most probable token of each position is so by CLEAR_MARGIN.

    Args:
        top_logprobs: the two or more most probable tokens of each position with their log probabilities, in nats.
    """
    ranked = (sorted(position.values(), reverse=True) for position in top_logprobs)
    return all(first - second >= CLEAR_MARGIN for first, second, *_ in ranked)


def _levels(params: Any) -> frozenset[int] | None:
    """Return the levels of a receipt's tokens: reused, computed and sampled."""
    receipt = (params or {}).get("morphserve")
    if receipt is None:
        return None
    kinds = ("reused_tokens", "computed_tokens", "output_tokens")
    return frozenset(int(level) for kind in kinds for level in receipt.get(kind, {}))


class Wave:
    """Sends until it is told to stop."""

    def __init__(self, session: aiohttp.ClientSession, options: ClientOptions, traffic: Traffic, seed: int) -> None:
        self._session = session
        self._options = options
        self._traffic = traffic
        self._draw = random.Random(seed)
        self._up = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        """Send in the block; at its end wait for every answer that is still owed."""
        self._tasks = [asyncio.create_task(self._client()) for _ in range(NUM_CLIENTS)]
        self._tasks += [asyncio.create_task(self._canary(i)) for i in range(NUM_CANARIES)]
        try:
            yield self
        finally:
            self._stopped = True
            self._up.set()
            await asyncio.gather(*self._tasks)

    async def swing(self, times: int, goes_on: Callable[[], bool] = lambda: False) -> None:
        """Go up and down so many times, and on while somebody needs it."""
        while times > 0 or goes_on():
            times -= 1
            self._up.set()
            await asyncio.sleep(ON_S)
            self._up.clear()
            await asyncio.sleep(OFF_S)

    async def _client(self) -> None:
        while not self._stopped:
            await self._up.wait()
            if self._stopped:
                return
            num_prompt, num_tokens = self._draw.randrange(20, 200), self._draw.randrange(20, 120)
            prompt = [self._draw.randrange(100, 5000) for _ in range(num_prompt)]
            outcome = self._traffic.begin(num_prompt, num_tokens)
            body = completion_body(self._options, prompt, num_tokens)
            await send(self._session, self._options, body, outcome, self._traffic.zero)
            if not outcome.ok:
                await asyncio.sleep(_PAUSE_S)

    async def _canary(self, first: int) -> None:
        for prompt in _round(first, len(canary_prompts())):
            if self._stopped:
                return
            before = self._traffic.num_mixings
            answer = await ask_canary(self._session, self._options, prompt)
            answer.is_mixed = before % 2 == 1 or self._traffic.num_mixings != before
            self._traffic.canaries.append(answer)
            if answer.status != "ok":
                await asyncio.sleep(_PAUSE_S)


def _round(first: int, count: int) -> Iterator[int]:
    while True:
        yield first % count
        first += 1


async def until(holds: Callable[[], bool], timeout_s: float, every_s: float = 0.05) -> bool:
    """Wait until something holds; False if it did not in time."""
    deadline = time.perf_counter() + timeout_s
    while not holds():
        if time.perf_counter() > deadline:
            return False
        await asyncio.sleep(every_s)
    return True
