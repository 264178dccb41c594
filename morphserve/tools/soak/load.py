"""Bursts of requests whose answers are known, and the books of what came of each."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from morphserve.tools.bench import ClientOptions, completion_body, send
from morphserve.tools.soak.recall import DISTANCE, NUM_TOKENS, answer
from morphserve.tools.workload import ERROR, OK, Outcome

BURST = 16  # requests: more than level 0's blocks hold
_COMMON_TOKENS = 96  # that half of the prompts begin with
_GIVE_UP_S = 0.3
_NUM_SHOWN = 20  # faults that are kept in words
STREAMED, WHOLE, GIVEN_UP = "streamed", "whole", "given_up"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a burst."""

    prompt: tuple[int, ...]
    num_tokens: int
    kind: str = STREAMED  # whole answers come with a receipt; some clients go away in the middle


def known_answer(ask: Ask) -> list[int]:
    """Return the right tokens, of the model whose answers are known."""
    return answer(ask.prompt, ask.num_tokens)


@dataclass(slots=True)
class Books:
    """What became of one server's requests. Nothing grows with their number but the times since the last sample."""

    expected: Callable[[Ask], list[int]] | None = known_answer  # None = only numbers of tokens are looked at
    sent: int = 0
    answered: int = 0  # with all of their tokens
    given_up: int = 0  # by the client
    lost: int = 0
    wrong: int = 0  # answered with another token than the right one, or a receipt that is not of this answer
    tokens: int = 0  # held against the right ones
    receipts: dict[str, int] = field(default_factory=dict)  # levels of an answer's tokens |-> answers
    faults: list[str] = field(default_factory=list)  # the first ones, in words
    ttfts_s: list[float] = field(default_factory=list)

    def enter(self, ask: Ask, outcome: Outcome, receipt: Mapping[str, Any] | None = None) -> None:
        """Book the end of a request."""
        self.sent += 1
        if not outcome.ok:
            if ask.kind == GIVEN_UP and not outcome.error:
                self.given_up += 1
                return
            self.lost += 1
            self._note(f"lost: {outcome.status}, {outcome.output_tokens} of {ask.num_tokens} tokens: {outcome.error}")
            return
        self.answered += 1
        self.tokens += len(outcome.token_ids)
        if outcome.ttft_s:
            self.ttfts_s.append(outcome.ttft_s)
        expected = outcome.token_ids if self.expected is None else self.expected(ask)
        if outcome.token_ids != expected:
            self.wrong += 1
            self._note(_difference(outcome.token_ids, expected))
        elif receipt is not None:
            self._check(receipt, ask.num_tokens)

    def _check(self, receipt: Mapping[str, Any], num_tokens: int) -> None:
        told = receipt["output_tokens"]
        if sum(told.values()) != num_tokens:
            self.wrong += 1
            self._note(f"wrong receipt: {told} of {num_tokens} tokens")
        kinds = ("reused_tokens", "computed_tokens", "output_tokens")
        levels = sorted({int(level) for kind in kinds for level in receipt[kind]})
        name = "0" if levels == [0] else "one other" if len(levels) == 1 else "several"
        self.receipts[name] = self.receipts.get(name, 0) + 1

    def _note(self, fault: str) -> None:
        if len(self.faults) < _NUM_SHOWN:
            self.faults.append(fault[:300])

    def as_json(self) -> dict[str, Any]:
        """Return the counts so far, and the times since the last call."""
        times, self.ttfts_s = sorted(self.ttfts_s), []
        return {
            "sent": self.sent, "answered": self.answered, "given_up": self.given_up, "lost": self.lost,
            "wrong": self.wrong, "tokens": self.tokens, "receipts": dict(self.receipts), "faults": list(self.faults),
            "ttft_p50_s": round(statistics.median(times), 4) if times else None,
            "ttft_max_s": round(times[-1], 4) if times else None,
        }  # fmt: skip


def _difference(tokens: Sequence[int], expected: Sequence[int]) -> str:
    where = [i for i, (got, want) in enumerate(zip(tokens, expected, strict=False)) if got != want]
    first = where[0] if where else min(len(tokens), len(expected))
    return f"wrong: {len(where)} of {len(expected)} tokens, the first at {first}, {len(tokens)} came"


def draw_burst(draw: random.Random, size: int = BURST) -> list[Ask]:
    """Draw requests of many lengths, half of them with a beginning in common."""
    common = [draw.randrange(NUM_TOKENS) for _ in range(_COMMON_TOKENS)]
    asks = []
    for i in range(size):
        length = draw.randrange(DISTANCE + 1, DISTANCE + 100)
        prompt = common if i % 2 else []
        prompt = prompt + [draw.randrange(NUM_TOKENS) for _ in range(length - len(prompt))]
        kind = (WHOLE, STREAMED, STREAMED, STREAMED, WHOLE, GIVEN_UP)[i] if i < 6 else STREAMED
        asks.append(Ask(tuple(prompt), draw.randrange(8, 140), kind))
    return asks


class Client:
    """Sends bursts to one server."""

    def __init__(self, session: aiohttp.ClientSession, options: ClientOptions) -> None:
        self._session = session
        self._options = options
        self.books = Books()

    async def burst(self, asks: Sequence[Ask]) -> None:
        """Send all at once, and wait for every answer."""
        await asyncio.gather(*map(self._one, asks))

    async def _one(self, ask: Ask) -> None:
        outcome = Outcome(0, 0.0, len(ask.prompt), ask.num_tokens)
        body = completion_body(self._options, list(ask.prompt), ask.num_tokens) | {"return_token_ids": True}
        if ask.kind == WHOLE:
            self.books.enter(ask, outcome, await self._whole(body, outcome))
            return
        try:
            async with asyncio.timeout(_GIVE_UP_S if ask.kind == GIVEN_UP else None):
                await send(self._session, self._options, body, outcome, time.perf_counter())
        except TimeoutError:
            pass  # gone, as meant
        self.books.enter(ask, outcome)

    async def _whole(self, body: dict[str, Any], outcome: Outcome) -> Mapping[str, Any] | None:
        """Ask for the answer in one piece; return its receipt, if one came."""
        body = body | {"stream": False, "vllm_xargs": {"morphserve_receipt": 1}}
        del body["stream_options"]
        try:
            async with (
                asyncio.timeout(self._options.request_timeout_s),
                self._session.post(f"{self._options.url}/v1/completions", json=body) as got,
            ):
                document = await got.json()
                if got.status != 200:
                    outcome.status, outcome.error = f"http_{got.status}", str(document)[:200]
                    return None
                outcome.token_ids = list(document["choices"][0]["token_ids"])
        except (aiohttp.ClientError, OSError, TimeoutError, LookupError, TypeError, ValueError) as e:
            outcome.status, outcome.error = ERROR, f"{type(e).__name__}: {e}"
            return None
        outcome.output_tokens = len(outcome.token_ids)
        outcome.status = OK if outcome.output_tokens == outcome.asked_tokens else ERROR
        outcome.error = "" if outcome.ok else "the answer was cut"
        receipt: Mapping[str, Any] | None = (document.get("kv_transfer_params") or {}).get("morphserve")
        return receipt
