"""Clients that go away, ask for the impossible, or for much at once."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from morphserve.tools.bench import completion_body
from morphserve.tools.chaos.adapters import write_adapter
from morphserve.tools.chaos.stage import Stage

_NUM_RECEIPTS, _AT_ONCE = 10_000, 100
_FLOOD_S, _FLOOD_PER_S, _RELOADS_PER_S = 10, 500, 50
_NUM_ADAPTERS = 3
_NUM_HELD, _MOST_TRIES = 6, 3
_WORDS = tuple(f"morphserve_{word}" for word in ("ttft_s", "tpot_s", "max_level", "precision", "receipt"))
_ASKS = {"morphserve_receipt": 1}
_IN_A_RECEIPT = '"demanded":'  # once in each


async def disconnects(stage: Stage) -> None:
    """Let clients with four answers each go away in the middle."""
    await stage.in_transition()
    for _ in range(10):
        body = completion_body(stage.options, [7] * 60, 200) | {"n": 4, "temperature": 0.8, "seed": 1}
        await asyncio.gather(*(_left(stage, body, 0.3) for _ in range(4)))


async def _left(stage: Stage, body: dict[str, Any], after_s: float) -> None:
    await stage.post("/v1/completions", body, timeout_s=after_s)


async def hostile_limits(stage: Stage) -> None:
    """Demand what cannot be had, and say what is no limit."""
    await stage.in_transition()
    limits: tuple[Any, ...] = (1e-9, 1e308, -1.0, 0, "soon", "nan", [], {"a": 1})
    bodies = [
        completion_body(stage.options, [9] * 30, 60) | {"vllm_xargs": {name: value}, "stream": False}
        for name in _WORDS
        for value in limits
    ]
    for body in bodies:
        del body["stream_options"]
    await asyncio.gather(*(stage.post("/v1/completions", body) for body in bodies))


async def held_requests(stage: Stage) -> None:
    """Demand level 0, strict limits and what cannot be had, all at once, until some have waited for their level."""
    strict = {"morphserve_ttft_s": 0.3, "morphserve_tpot_s": 0.15}
    for _ in range(_MOST_TRIES):
        await stage.in_transition()
        # Once nobody is held up for them any more they wait, under a load that goes on for as long as it goes on.
        asks = [stage.stream(40, 40, vllm_xargs=asked) for asked in ({"morphserve_max_level": 0}, strict) * _NUM_HELD]
        stage.owed += map(asyncio.create_task, asks)
        await hostile_limits(stage)
        status = await stage.status_from_now()
        if status is not None and status["num_held_total"]:
            return
    raise AssertionError("no request has waited for its level")


async def many_receipts(stage: Stage) -> None:
    """Ask for a receipt with each of 10,000 requests that wait at once."""
    await stage.in_transition()
    # By the hundred, as prompts of one question: the server's list of new connections is not as long.
    body = completion_body(stage.options, [], 1) | {"prompt": [[11] * 4] * _AT_ONCE, "vllm_xargs": _ASKS}
    asks = (stage.post("/v1/completions", body, timeout_s=600.0) for _ in range(_NUM_RECEIPTS // _AT_ONCE))
    answers = await asyncio.gather(*asks)
    found = sum(text.count(_IN_A_RECEIPT) for _, text in answers) + sum(_AT_ONCE for code, _ in answers if code == 503)
    if found != _NUM_RECEIPTS:
        codes = sorted({code for code, _ in answers})
        raise AssertionError(f"{found:,} of {_NUM_RECEIPTS:,} requests got a receipt; the answers were {codes}")


async def flood(stage: Stage) -> None:
    """Ask for status, page, metrics and reload 500 times a second, for ten seconds."""
    await stage.in_transition()
    beats = _FLOOD_S * 10
    asks: set[asyncio.Task[tuple[int, str]]] = set()
    for _ in range(beats):
        for i in range((_FLOOD_PER_S - _RELOADS_PER_S) // 10):
            path = ("/morphserve/status", "/metrics", "/morphserve/view")[0 if i % 10 else 1 + i // 10 % 2]
            asks.add(asyncio.create_task(stage.get(path)))
        asks |= {asyncio.create_task(stage.post("/morphserve/reload", None)) for _ in range(_RELOADS_PER_S // 10)}
        await asyncio.sleep(0.1)
    codes = [code for code, _ in await asyncio.gather(*asks)]
    strange = sorted({code for code in codes if code not in (200, 429)})
    if strange:
        raise AssertionError(f"of {len(codes):,} questions {sum(code in strange for code in codes)} got {strange}")


async def all_features(stage: Stage) -> None:
    """Ask for much of what vLLM can: several answers, beams, a JSON schema, log probabilities, an echo."""
    await stage.in_transition()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    plain = {"model": stage.options.model, "prompt": [13] * 40, "max_tokens": 40}
    bodies: list[dict[str, Any]] = [
        plain | {"n": 4, "temperature": 0.9, "seed": 3},
        plain | {"use_beam_search": True, "n": 3, "temperature": 0.0},
        plain | {"structured_outputs": {"json": schema}},
        plain | {"prompt_logprobs": 2, "logprobs": 3},
        plain | {"echo": True, "logprobs": 1},
        plain | {"stop_token_ids": [2], "min_tokens": 3},
    ]
    answers = await asyncio.gather(*(stage.post("/v1/completions", body) for body in bodies * 4))
    refused = [text[:200] for status, text in answers if status not in (200, 503)]
    if refused:
        raise AssertionError(f"{len(refused)} of {len(answers)} requests with features were not answered: {refused[0]}")


async def priorities(stage: Stage) -> None:
    """Send requests of many priorities, by which the scheduler preempts and a shrink chooses."""
    draw = random.Random(5)
    for _ in range(2):
        await stage.in_transition()
        asked = [(draw.randrange(20, 200), draw.randrange(20, 80), draw.randrange(-5, 6)) for _ in range(16)]
        await asyncio.gather(*(stage.stream(prompt, tokens, priority=priority) for prompt, tokens, priority in asked))


async def adapters(stage: Stage) -> None:
    """Load LoRA adapters, ask each of them, and unload them, on the way down and in the way back."""
    for turn in range(2):
        names = [f"adapter-{turn}-{i}" for i in range(_NUM_ADAPTERS)]
        await stage.in_transition()
        for i, name in enumerate(names):
            path = write_adapter(stage.model, stage.config.parent / name, seed=i)
            await _must(stage, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        with stage.traffic.mixing():
            await asyncio.gather(*(stage.stream(40, 30, model=name) for name in names * 2))
        for name in names:
            await _must(stage, "/v1/unload_lora_adapter", {"lora_name": name})


async def _must(stage: Stage, path: str, body: Any) -> None:
    code, text = await stage.post(path, body)
    if code != 200:
        raise AssertionError(f"POST {path} is answered with {code}: {text[:200]}")
