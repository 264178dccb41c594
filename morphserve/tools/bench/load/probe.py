"""How fast is a stock server? A minute of requests, seen from the client, makes a step-time model."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import aiohttp

from morphserve.tools.bench.load.client import ClientOptions, completion_body, new_session, send
from morphserve.tools.bench.load.server import ServerOptions
from morphserve.tools.workload import Outcome, ReplayError
from policies import StepTime

LONE_PROMPT_TOKENS = 40  # about the mean of the conversation windows
_LONE_TOKENS = 24
_ROUNDS = 2
_ENOUGH_S = 25.0  # no further round after this: the slowest machines have told enough in one
_LEAST_S = 1e-5  # no step takes less
_SHORT_PREFILL = 16  # prompt tokens of a lone request; and of a longer one, for what a prompt token takes


@dataclass(frozen=True, slots=True)
class StockSpeed:
    """What a stock server takes for its steps, all in seconds."""

    step: StepTime
    offset_s: float  # of a request's time to the first token, beside its prefill
    lone_ttft_s: float  # of a request of LONE_PROMPT_TOKENS that is alone
    lone_tpot_s: float

    @classmethod
    def calibrated(cls, step: StepTime, offset_s: float, speed: float = 1.0) -> StockSpeed:
        """Return the speed that calibration knows, on a machine that takes `speed` times as long."""
        scaled = StepTime(
            step.base_s * speed, step.per_seq_s * speed, step.per_prefill_token_s * speed,
            step.per_context_token_s * speed,
        )  # fmt: skip
        ttft_s = offset_s * speed + scaled.seconds(1, LONE_PROMPT_TOKENS - 1, LONE_PROMPT_TOKENS)
        return cls(scaled, offset_s * speed, ttft_s, scaled.seconds(1, 0, LONE_PROMPT_TOKENS + _LONE_TOKENS // 2))


@dataclass(slots=True)
class _Found:
    """Raw figures of all rounds."""

    ttfts: list[float] = field(default_factory=list)  # of lone requests
    gaps: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (sequences, mean KV tokens) |-> steps
    prefills: dict[int, list[float]] = field(default_factory=dict)  # prompt tokens |-> times to the first token

    def add(self, outcomes: Sequence[Outcome], prompt_tokens: int, max_tokens: int) -> None:
        """Take in requests that decoded together."""
        load = len(outcomes), len(outcomes) * (prompt_tokens + max_tokens // 2)
        self.gaps.setdefault(load, []).extend(_gaps(outcomes))


def probe(options: ServerOptions, client: ClientOptions, tokens: Sequence[int]) -> StockSpeed:
    """Measure the server at `client.url`, which serves nobody else, with one request and with a full KV cache.

    Args:
        options: what the server was started with.
        tokens: ids that prompts are cut from.

    Raises:
        ReplayError: a request fails, or the times make no sense.
    """
    return asyncio.run(_probe(options, replace(client, request_timeout_s=120.0), tokens))


async def _probe(options: ServerOptions, client: ClientOptions, tokens: Sequence[int]) -> StockSpeed:
    found = _Found()
    begin = time.perf_counter()
    async with new_session() as session:
        sender = _Sender(session, client, tokens)
        await sender.all(1, 8, 8)  # first-use costs are nobody's steps
        for _ in range(_ROUNDS):
            await _round(sender, options, found)
            if time.perf_counter() - begin > _ENOUGH_S:
                break
    return _speed(found)


class _Sender:
    """Sends requests together; no two prompts begin alike, so that no prefix cache helps."""

    def __init__(self, session: aiohttp.ClientSession, client: ClientOptions, tokens: Sequence[int]) -> None:
        self._session = session
        self._client = client
        self._tokens = list(tokens)
        self._sent = 0

    async def all(self, count: int, prompt_tokens: int, max_tokens: int) -> list[Outcome]:
        """Send so many requests at once; return their outcomes in the order of their first tokens."""
        zero = time.perf_counter()
        outcomes = [Outcome(i, 0.0, prompt_tokens, max_tokens) for i in range(count)]
        bodies = [completion_body(self._client, self._prompt(prompt_tokens), max_tokens) for _ in outcomes]
        await asyncio.gather(
            *(send(self._session, self._client, b, o, zero) for b, o in zip(bodies, outcomes, strict=True))
        )
        if failed := [o for o in outcomes if not o.ok]:
            raise ReplayError(
                f"{self._client.url}: {len(failed)} of {count} requests that measure its steps failed, the first with "
                f"{failed[0].status} {failed[0].error}. Its log says why; without --fit nothing is measured beforehand."
            )
        return sorted(outcomes, key=lambda o: (o.sent_s or 0.0) + o.ttft_s)

    def _prompt(self, length: int) -> list[int]:
        start = 37 * self._sent % len(self._tokens)
        self._sent += 1
        turned = self._tokens[start:] + self._tokens[:start]
        return (turned * (1 + length // len(turned)))[:length]


async def _round(sender: _Sender, options: ServerOptions, found: _Found) -> None:
    for _ in range(2):
        (lone,) = await sender.all(1, LONE_PROMPT_TOKENS, _LONE_TOKENS)
        found.ttfts.append(lone.ttft_s)
        found.add([lone], LONE_PROMPT_TOKENS, _LONE_TOKENS)
        for length in (_SHORT_PREFILL, _long_prefill(options)):
            (one,) = await sender.all(1, min(length, options.max_model_len - 1), 1)
            found.prefills.setdefault(one.prompt_tokens, []).append(one.ttft_s)
    for load in _batches(options):
        found.add(await sender.all(*load), *load[1:])


def _long_prefill(options: ServerOptions) -> int:
    """Return the tokens of a prompt that one step prefills, and that a quick device takes longer for than for a token.

    A quarter of the longest request's, so long as the KV cache and a step of vLLM's least default hold it.
    """
    room = (options.num_blocks - 1) * options.block_size // 2
    return max(min(options.max_model_len // 4, room, 1024), 2 * _SHORT_PREFILL)


def _batches(options: ServerOptions) -> list[tuple[int, int, int]]:
    """Return (requests, prompt tokens, answer tokens) that fit into the KV cache: few, some, all; long ones."""
    blocks = options.num_blocks - 1  # the null block holds nothing
    prompt, answer = max(options.block_size // 4, 1), max(options.block_size // 2, 4)
    per_request = -(-(prompt + answer) // options.block_size)
    most = max(min(blocks // per_request, options.max_num_seqs), 1)
    counts = dict.fromkeys(max(most // part, 1) for part in (12, 3, 1))
    long = min(options.max_model_len, blocks * options.block_size // 4) - 2 * options.block_size
    few = min(4, options.max_num_seqs)
    return [(count, prompt, answer) for count in counts] + ([(few, long, answer)] if long > 4 * prompt else [])


def _gaps(outcomes: Sequence[Outcome]) -> list[float]:
    """Return the gaps in which all decoded: of the request that began last, without those after another's end."""
    last = outcomes[-1]
    return list(last.itls_s if len(outcomes) == 1 else last.itls_s[1:-2])


def _speed(found: _Found) -> StockSpeed:
    """Fit lines through medians: one stall of the machine must not bend what a minute of steps says.

    No coefficient is below 0, and what no request and no token explains is at least a tenth of a lone request's step.
    """
    lone_ttft_s = statistics.median(found.ttfts)
    steps = {load: max(statistics.median(gaps), _LEAST_S) for load, gaps in found.gaps.items()}
    lone_tpot_s = next(seconds for (count, _), seconds in steps.items() if count == 1)
    (short, short_s), (long, long_s) = sorted((n, statistics.median(times)) for n, times in found.prefills.items())
    per_prefill_s = max(long_s - short_s, 0.0) / (long - short)
    offset_s = max(short_s - lone_tpot_s - (short - 1) * per_prefill_s, 0.0)
    per_seq_s, per_context_s = _slopes([(*load, seconds) for load, seconds in steps.items()])
    base_s = max(lone_tpot_s - per_seq_s, 0.1 * lone_tpot_s)
    return StockSpeed(StepTime(base_s, per_seq_s, per_prefill_s, per_context_s), offset_s, lone_ttft_s, lone_tpot_s)


def _slopes(steps: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Return seconds for a sequence, and for a token of KV, from (sequences, KV tokens, seconds) of a few loads.

    The load with the most KV tokens for a sequence tells what a token takes, all others what a sequence takes.
    """
    deep = max(steps, key=lambda step: step[1] / step[0])
    shallow = [step for step in steps if step is not deep]
    lone = min(shallow)
    over = [(count - lone[0], seconds - lone[2]) for count, _, seconds in shallow]
    square = sum(count * count for count, _ in over)
    per_seq_s = max(sum(count * seconds for count, seconds in over) / square, 0.0) if square else 0.0
    near = min(shallow, key=lambda step: abs(step[0] - deep[0]))
    rest_s = deep[2] - near[2] - per_seq_s * (deep[0] - near[0])
    return per_seq_s, max(rest_s, 0.0) / max(deep[1] - near[1], 1)
