"""A server that speaks vLLM's OpenAI dialect, in this process or, run as a script, as `vllm serve`."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

CORPUS = "\n".join(
    " ".join(f"line{number}word{word}" for word in range(3 + number % 17)) for number in range(120)
)


def encode(text: str, special: bool) -> list[int]:
    """A tokenizer with one id per word, 1 for the line end and 0 before everything."""
    ids = [2 + sum(ord(c) * 31**i for i, c in enumerate(word)) % 50_000 for word in text.split()]
    return ([0] if special else []) + ids + ([1] if text.endswith("\n") else [])


class FakeServer:
    """Streams `max_tokens` chunks per request; `behave` makes it fail on purpose.

    `behave(body)` answers ok, 503, hang, short, error_chunk, garbage or no_token.
    """

    def __init__(self, behave: Callable[[dict[str, Any]], str] = lambda _: "ok", morph: bool = False) -> None:
        self.behave = behave
        self.morph = morph
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = 0
        self.hold_until_in_flight = 0  # answer nobody before this many requests are here
        self.everyone_here = asyncio.Event()
        self.finished = 0
        self.tokens = 0
        self.pages_served = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/morphserve/status", self._status)
        app.router.add_post("/v1/completions", self._completions)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="")

    async def _metrics(self, _: web.Request) -> web.Response:
        self.pages_served += 1
        label = 'engine="0",model_name="demo"'
        lines = [
            "# HELP vllm:num_requests_waiting x",
            f"vllm:num_requests_waiting{{{label}}} 0.0",
            f"vllm:num_requests_running{{{label}}} {self.in_flight}.0",
            f"vllm:kv_cache_usage_perc{{{label}}} 0.5",
            f"vllm:num_preemptions_total{{{label}}} {self.finished}.0",
            f'vllm:cache_config_info{{block_size="32",num_gpu_blocks="49",{label}}} 1.0',
        ]
        if self.morph:
            level = 1 if self.in_flight else 0
            lines += [
                f"morphserve:level {level}",
                f'morphserve:kv_blocks{{state="published"}} {49 + 40 * level}',
                'morphserve:kv_blocks{state="used"} 24',
                f'morphserve:tokens_total{{level="0"}} {self.tokens}',
                f'morphserve:tokens_total{{level="1"}} {self.tokens}',
                f'morphserve:transitions_total{{direction="degrade",outcome="committed"}} {self.finished}',
                f"morphserve:pause_ms_max {7.5 if self.finished > 1 else 2.5}",  # a longer one than in the warm-up
            ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _status(self, _: web.Request) -> web.Response:
        if not self.morph:
            raise web.HTTPNotFound
        ladder = [
            {"level": 0, "num_kv_blocks": 49, "expected_kl": None},
            {"level": 1, "num_kv_blocks": 89, "expected_kl": 0.02},
        ]
        return web.json_response({"ladder": ladder, "level": 0, "tokens_by_level": {"0": self.tokens, "1": 0}})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        what = self.behave(body)
        self.in_flight += 1
        try:
            if self.in_flight >= self.hold_until_in_flight:
                self.everyone_here.set()
            await self.everyone_here.wait()
            if what == "503":
                return web.json_response({"error": "queue is full"}, status=503)
            return await self._stream(request, body, what)
        finally:
            self.in_flight -= 1
            self.finished += 1

    async def _stream(self, request: web.Request, body: dict[str, Any], what: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": ping\n\n")
        tokens = {"short": 1, "no_token": 0, "garbage": 0, "hang": 1, "error_chunk": 1}.get(
            what, body["max_tokens"]
        )
        for number in range(tokens):
            choice: dict[str, Any] = {"text": f"w{number} ", "token_ids": [number]}
            if width := body.get("logprobs"):
                top = {f"token_id:{number + i}": -0.5 - i for i in range(width)}
                choice["logprobs"] = {"tokens": [f"token_id:{number}"], "top_logprobs": [top]}
            await self._event(response, {"choices": [choice]})
        self.tokens += tokens
        if what == "hang":
            await asyncio.Event().wait()
        if what == "error_chunk":
            await self._event(response, {"error": {"message": "engine died"}})
        if what == "garbage":
            await response.write(b"data: {not json\n\n")
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
        await self._event(response, {"choices": [], "usage": usage})
        if self.morph and body.get("vllm_xargs", {}).get("morphserve_receipt") == "tokens":
            await self._event(response, {"choices": [], "morphserve": {"token_levels": [[0, 1], [1, tokens - 1]]}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _event(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        raw = f"data: {json.dumps(event)}\n\n".encode()
        await response.write(raw[:7])  # a chunk boundary in the middle of the event
        await response.write(raw[7:])


def main() -> None:
    """Stand in for `vllm serve`: same options, plus --fake to choose what goes wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--plugin")
    parser.add_argument("--fake", default="ok")
    args, _ = parser.parse_known_args()
    if args.fake == "die":
        sys.exit("KV cache is too small: 3 blocks, limit 16")
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])  # an engine process
    Path(f"{args.fake}.pid").write_text(str(child.pid)) if args.fake.startswith("/") else None
    server = FakeServer(morph=args.plugin == "morphserve")
    web.run_app(
        server.app() if args.fake != "unhealthy" else web.Application(),
        host="127.0.0.1",
        port=args.port,
        print=None,
    )


if __name__ == "__main__":
    main()
