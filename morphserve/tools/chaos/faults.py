"""What is done to a server from outside, while it morphs: signals, files, limits, and clients that behave badly.

Each takes a `Stage` and returns when the server is again as it should be, but for what it must recover from itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from morphserve.tools.bench import ClientOptions, completion_body
from morphserve.tools.chaos import processes
from morphserve.tools.chaos.load import Traffic, until

FROZEN_S = 4.0  # a process that the system does not run for so long
_BURST_S = 30.0  # by then a burst has brought a transition
_MIB = 1 << 20


@dataclass(slots=True)
class Stage:
    """A running server, and what a fault may reach of it."""

    session: aiohttp.ClientSession
    options: ClientOptions
    pid: int  # of the API server, and of its session
    config: Path  # the YAML
    cache: Path  # where packed layers lie
    levels: Callable[[], tuple[int, int]]  # level and transitions begun, as last polled
    traffic: Traffic
    break_library: Path  # while it exists, the library in front of libc fails (`libraries`)

    async def in_transition(self) -> None:
        """Wait until the level is about to change, or has just changed."""
        begun = self.levels()
        await until(lambda: self.levels() != begun, _BURST_S)

    async def post(self, path: str, body: Any, timeout_s: float = 60.0) -> tuple[int, str]:
        """Send a POST, and return what came back; 0 = nothing."""
        return await self._ask("POST", path, body, timeout_s)

    async def get(self, path: str, timeout_s: float = 60.0) -> tuple[int, str]:
        """Send a GET, and return what came back; 0 = nothing."""
        return await self._ask("GET", path, None, timeout_s)

    async def _ask(self, how: str, path: str, body: Any, timeout_s: float) -> tuple[int, str]:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.session.request(how, f"{self.options.url}{path}", json=body) as answer,
            ):
                return answer.status, await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0, ""


async def nothing(stage: Stage) -> None:
    """Leave it alone: what the load itself does."""
    await stage.in_transition()


async def frozen_rank(stage: Stage) -> None:
    """Stop a worker in a transition, twice, and let it go on."""
    await _frozen(stage, processes.ranks(stage.pid))


async def frozen_core(stage: Stage) -> None:
    """Stop the engine core in a transition, twice, and let it go on."""
    await _frozen(stage, processes.with_title(stage.pid, processes.CORE))


async def _frozen(stage: Stage, pids: list[int]) -> None:
    for _ in range(2):
        await stage.in_transition()
        processes.send(pids, signal.SIGSTOP)
        try:
            await asyncio.sleep(FROZEN_S)
        finally:
            processes.send(pids, signal.SIGCONT)


async def killed_rank(stage: Stage) -> None:
    """Kill a worker in a transition."""
    await stage.in_transition()
    processes.send(processes.ranks(stage.pid), signal.SIGKILL)


async def killed_core(stage: Stage) -> None:
    """Kill the engine core in a transition."""
    await stage.in_transition()
    processes.send(processes.with_title(stage.pid, processes.CORE), signal.SIGKILL)


async def hangup(stage: Stage) -> None:
    """Close the terminal: SIGHUP to every process of the group."""
    await stage.in_transition()
    os.killpg(stage.pid, signal.SIGHUP)
    await asyncio.sleep(1.0)


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
        for name in ("morphserve_ttft_s", "morphserve_tpot_s", "morphserve_max_level", "morphserve_receipt")
        for value in limits
    ]
    for body in bodies:
        del body["stream_options"]
    await asyncio.gather(*(stage.post("/v1/completions", body) for body in bodies))


async def many_receipts(stage: Stage) -> None:
    """Ask for a receipt with each of many requests that wait at once."""
    await stage.in_transition()
    body = completion_body(stage.options, [11] * 12, 4) | {"vllm_xargs": {"morphserve_receipt": 1}, "stream": False}
    del body["stream_options"]
    await asyncio.gather(*(stage.post("/v1/completions", body) for _ in range(400)))


async def flood(stage: Stage) -> None:
    """Ask for status, page and reload as fast as a few hundred times a second, for ten seconds."""
    await stage.in_transition()
    for _ in range(100):
        asks = [stage.get("/morphserve/status"), stage.get("/metrics"), stage.get("/morphserve/view")]
        await asyncio.gather(*asks * 6, *(stage.post("/morphserve/reload", None) for _ in range(2)), asyncio.sleep(0.1))


async def damaged_yaml(stage: Stage) -> None:
    """Leave the YAML empty, cut, of no sense and away, and then as it was."""
    was = stage.config.read_text(encoding="utf-8")
    await stage.in_transition()
    for text in ("", was[: len(was) // 2], "policy: [", "policy: {kind: threshold, degrade_above: 7}\n", "\0" * 64):
        stage.config.write_text(text, encoding="utf-8")
        await asyncio.sleep(2.5)  # two looks must agree
    stage.config.unlink()
    await asyncio.sleep(2.5)
    stage.config.write_text(was, encoding="utf-8")
    await asyncio.sleep(2.5)


async def changed_cache(stage: Stage) -> None:
    """Flip a byte in the middle of each packed file, in place."""
    for path in _packed(stage.cache):
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x55]))
    await stage.in_transition()


async def removed_cache(stage: Stage) -> None:
    """Take every packed file away."""
    for path in _packed(stage.cache):
        path.unlink()
    await stage.in_transition()


def _packed(cache: Path) -> Iterator[Path]:
    return (path for path in sorted(cache.rglob("*.safetensors")) if path.is_file())


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


async def resets(stage: Stage) -> None:
    """Reset the prefix cache in the way down and in the way back."""
    for _ in range(6):
        await stage.in_transition()
        await stage.post("/reset_prefix_cache", None)


async def small_files(stage: Stage) -> None:
    """Let no process write to files any more, as on a full disk, for a while."""
    await _limited(stage, resource.RLIMIT_FSIZE, 0)


async def no_more_memory(stage: Stage) -> None:
    """Let the ranks take a little memory more than they have, and no more, for a while."""
    await _limited(stage, resource.RLIMIT_DATA, None)


async def _limited(stage: Stage, what: int, value: int | None) -> None:
    """Lower a limit of core and ranks; None = to what the process has now and 64 MiB."""
    pids = {*processes.with_title(stage.pid, processes.CORE), *processes.ranks(stage.pid)}
    before = {pid: resource.prlimit(pid, what) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, what, (_data_bytes(pid) + 64 * _MIB if value is None else value, hard))
    try:
        await stage.in_transition()
        await asyncio.sleep(FROZEN_S)
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, what, limits)


def _data_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no VmData")


async def failing_madvise(stage: Stage) -> None:
    """Let the system refuse to take memory back, for a while."""
    with _exists(stage.break_library):
        await stage.in_transition()
        await asyncio.sleep(2 * FROZEN_S)


@contextmanager
def _exists(path: Path) -> Iterator[None]:
    path.write_text(json.dumps({}), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink()
