"""What does a flood of questions about the server cost those whom it answers? Paired time per token of a canary.

One server with the plugin at level 0 answers one streaming request after the other. In turn, the order swapped from
round to round: alone; while another process asks `/version`, which is vLLM's own and costs next to nothing, so that
many times a second; and while it asks for status, page and reload instead. API server, canary and flood stay off the
engine's core where there are others. The first ratio holds what any client costs on the cores that are left, the
second what our routes add.

Output columns: round, time per token alone (ms), ratios: `/version` over alone, ours over alone, ours over `/version`.
Last stdout line: one JSON document.

    python scripts/bench_flood.py --model MODEL_DIR --rounds 10
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from bench_idle import at_level_0

from morphserve.serve_dtype import add_dtype_option, resolve_dtype
from morphserve.tools.bench import ServerOptions, half_width, serve
from morphserve.tools.command import command_parser, run_command
from morphserve.tools.machine import describe_machine

_OURS = (*["/morphserve/status"] * 9, "/morphserve/view")
_RELOADS_PER_S = 20
_SETTLE_S = 1.0  # of a flood, before it counts
_KINDS = ("alone", "version", "ours")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", default="policies/yaml/demo.yaml", help="MorphServe YAML")
    parser.add_argument("--out", type=Path, default=Path("reports/flood"), help="server log")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--per-second", type=int, default=500, help="questions")
    parser.add_argument("--tokens", type=int, default=96, help="of a canary")
    parser.add_argument("--core", type=int, default=0, help="of the engine; all else is kept on others")
    parser.add_argument("--flood", nargs=2, metavar=("URL", "KIND"), help=argparse.SUPPRESS)
    add_dtype_option(parser)
    args = parser.parse_args(argv)
    if args.flood:
        token = (args.out / "admin.token").read_text(encoding="utf-8")
        asyncio.run(_flood(*args.flood, args.per_second, {"authorization": f"Bearer {token}"}))
        return 0
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: a spread needs at least 2")
    return run_command("bench_flood", lambda: _measure(args), "server stopped")


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    args.out.mkdir(parents=True, exist_ok=True)
    settings = at_level_0(Path(args.config))
    config, token = args.out.resolve() / "morph.yaml", args.out.resolve() / "admin.token"
    config.write_text(yaml.safe_dump({**settings, "admin": {"token_file": str(token)}}), encoding="utf-8")
    token.unlink(missing_ok=True)
    token.touch(0o600)
    token.write_text(secrets.token_hex(16), encoding="utf-8")
    plugin = ("--plugin", "morphserve", "--morphserve-config", str(config))
    dtype = resolve_dtype(args.dtype, args.model)
    options = ServerOptions(
        model=args.model, num_blocks=257, dtype=dtype, cpu_bind=str(args.core), extra_args=plugin
    )
    found: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    with serve(options, args.out / "server.log") as server:
        for pid in (int(server.pid or 0), os.getpid()):  # floods are started from here, and stay where this is
            _keep_off(pid, args.core)
        for _ in range(2):  # kernels, allocator
            _time_per_token(server.url, options.served_model_name, args.tokens)
        for number in range(args.rounds):
            for kind in _KINDS if number % 2 == 0 else reversed(_KINDS):
                with _flooded(server.url, kind, args):
                    found[kind].append(_time_per_token(server.url, options.served_model_name, args.tokens))
            alone, version, ours = (found[kind][-1] for kind in _KINDS)
            ratios = f"{version / alone:.4f}  {ours / alone:.4f}  {ours / version:.4f}"
            print(f"round {number + 1}  {alone * 1e3:.2f}  {ratios}", file=sys.stderr, flush=True)
    result = {
        "machine": describe_machine(),
        "per_second": args.per_second,
        "alone_ms": [round(value * 1e3, 3) for value in found["alone"]],
        "version_over_alone": _ratio(found["version"], found["alone"]),
        "ours_over_alone": _ratio(found["ours"], found["alone"]),
        "ours_over_version": _ratio(found["ours"], found["version"]),
    }
    for name in ("version_over_alone", "ours_over_alone", "ours_over_version"):
        print(f"{name}: {result[name]['mean']:.4f} +- {result[name]['half_width_95']:.4f}")
    return result


def _keep_off(pid: int, core: int) -> None:
    """Have all threads of a process run on other cores than that of the engine, if there are any."""
    others = os.sched_getaffinity(0) - {core}
    for thread in Path(f"/proc/{pid}/task").iterdir() if others else ():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), others)


def _ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"mean": round(statistics.fmean(ratios), 4), "half_width_95": round(half_width(ratios), 4)}


def _time_per_token(url: str, model: str, num_tokens: int) -> float:
    """Return the seconds between a streamed answer's first and last chunk, over the tokens between: a busy server sends
    several in one."""
    body = {
        "model": model, "prompt": [17] * 64, "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    seen = []  # of each chunk: when it came, tokens so far
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {") and (chunk := json.loads(line[6:]))["choices"]:
                seen.append((time.perf_counter(), chunk["usage"]["completion_tokens"]))
    (first_s, first), (last_s, last) = seen[0], seen[-1]
    if last != num_tokens:
        raise RuntimeError(f"{last} tokens for {num_tokens}: no time per token can be told")
    return float(last_s - first_s) / (last - first)


@contextlib.contextmanager
def _flooded(url: str, kind: str, args: argparse.Namespace) -> Iterator[None]:
    """Ask in the block, from another process; RuntimeError if it asks fewer than nine of ten, or is answered oddly."""
    if kind == "alone":
        yield
        return
    rate = str(args.per_second)
    command = [sys.executable, __file__, "--model", args.model, "--out", str(args.out), "--per-second", rate]
    flood = subprocess.Popen([*command, "--flood", url, kind], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        assert flood.stdout is not None
        flood.stdout.readline()  # it has begun
        time.sleep(_SETTLE_S)
        yield
        told, _ = flood.communicate("enough\n", timeout=60)
        sent = json.loads(told)
        if sent["per_second"] < 0.9 * args.per_second or set(sent["codes"]) - {"200", "429"}:
            raise RuntimeError(f"the flood was not what was asked for: {sent}")
    finally:
        flood.kill()
        flood.wait()


async def _flood(url: str, kind: str, per_second: int, headers: dict[str, str]) -> None:
    """Ask until standard input says enough; print the answers' codes and the questions a second."""
    codes: dict[str, int] = {}
    asks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    enough = loop.run_in_executor(None, sys.stdin.readline)

    async def ask(number: int) -> None:
        reloads = kind == "ours" and number % (per_second // _RELOADS_PER_S) == 0
        path = "/version" if kind == "version" else "/morphserve/reload" if reloads else _OURS[number % len(_OURS)]
        request = session.post(url + path, json={}) if reloads else session.get(url + path)
        async with request as answer:
            await answer.read()
            codes[str(answer.status)] = codes.get(str(answer.status), 0) + 1

    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=100)) as session:
        print("asks", flush=True)
        begin, sent = loop.time(), 0
        while not enough.done():
            due = int((loop.time() - begin) * per_second)
            asks |= {asyncio.create_task(ask(number)) for number in range(sent, due)}
            sent = due
            asks = {each for each in asks if not each.done()}
            await asyncio.sleep(0.01)
        seconds = loop.time() - begin
        await asyncio.gather(*asks)
    print(json.dumps({"per_second": sum(codes.values()) / seconds, "codes": codes}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
