"""What a fault may reach of a running server: its processes, files and doors, and the traffic beside it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from morphserve.tools.bench import ClientOptions, completion_body, send
from morphserve.tools.chaos.load import Traffic, until

FROZEN_S = 4.0  # a process that the system does not run for so long
BURST_S = 30.0  # by then a burst has brought a transition
_PATIENCE_S = 20.0  # for a server's next look at its engine


@dataclass(slots=True)
class Stage:
    """A running server, and what a fault may reach of it."""

    session: aiohttp.ClientSession
    options: ClientOptions
    pid: int  # of the API server, and of its session
    model: Path
    config: Path  # the YAML
    cache: Path  # where packed layers lie
    levels: Callable[[], tuple[int, int] | None]  # level and transitions ended, as last polled; None: not yet
    traffic: Traffic
    break_file: Path  # what it says, the library in front of libc does (`libraries`)
    token: str  # that changes something
    owed: list[asyncio.Task[None]] = field(default_factory=list)  # that end after the load alone

    async def in_transition(self) -> None:
        """Wait until the level is about to change, or has just changed."""
        await until(lambda: self.levels() is not None, BURST_S)
        begun = self.levels()
        await until(lambda: self.levels() != begun, BURST_S)

    async def above_level_0(self) -> None:
        """Wait until layers are away."""
        await until(lambda: self.level > 0, BURST_S)

    @property
    def level(self) -> int:
        """As last polled."""
        return (self.levels() or (0, 0))[0]

    async def met(self) -> None:
        """Wait until somebody has met what the library does."""
        if not await until(self._met_file.exists, BURST_S):
            raise AssertionError(f"nobody called what was to fail within {BURST_S:.0f} s: nothing was tried")

    @property
    def _met_file(self) -> Path:
        return self.break_file.with_name(f"{self.break_file.name}.met")

    @contextmanager
    def broken(self, how: str) -> Iterator[None]:
        """Have the library in front of libc do something in the block."""
        self._met_file.unlink(missing_ok=True)
        partial = self.break_file.with_suffix(".partial")
        partial.write_text(f"{how}\n", encoding="utf-8")
        partial.rename(self.break_file)
        try:
            yield
        finally:
            self.break_file.unlink(missing_ok=True)

    async def post(self, path: str, body: Any, timeout_s: float = 60.0) -> tuple[int, str]:
        """Send a POST, and return what came back; 0 = nothing."""
        return await self._ask("POST", path, "" if body is None else json.dumps(body), timeout_s)

    async def get(self, path: str, timeout_s: float = 60.0) -> tuple[int, str]:
        """Send a GET, and return what came back; 0 = nothing."""
        return await self._ask("GET", path, None, timeout_s)

    async def status(self) -> dict[str, Any] | None:
        """Return the status of the server's last look at its engine; None: it does not answer."""
        code, text = await self.get("/morphserve/status", timeout_s=10.0)
        return dict(json.loads(text)) if code == 200 else None

    async def status_from_now(self) -> dict[str, Any] | None:
        """Return a status of a look that begins from now on; None: there is none within a while."""
        begin = time.monotonic()
        while (waited_s := time.monotonic() - begin) < _PATIENCE_S:
            status = await self.status()
            if status is None or status.get("age_s", 0.0) <= waited_s:
                return status
            await asyncio.sleep(0.25)
        return None

    async def order(self, action: str, **body: Any) -> None:
        """Give an operator's order, which must be taken."""
        _, state = await self.get("/morphserve/admin/state")
        revision = json.loads(state)["revision"]
        code, text = await self.post(f"/morphserve/admin/{action}", {**body, "cause": "chaos", "revision": revision})
        if code != 200:
            raise AssertionError(f"the order to {action} is answered with {code}: {text[:200]}")

    async def stream(self, num_prompt: int, num_tokens: int, **more: Any) -> None:
        """Send one more request of the traffic, which is judged as all of them."""
        outcome = self.traffic.begin(num_prompt, num_tokens)
        body = completion_body(self.options, [17] * num_prompt, num_tokens) | more
        await send(self.session, self.options, body, outcome, self.traffic.zero)

    async def _ask(self, how: str, path: str, data: str | None, timeout_s: float) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        if path.startswith("/morphserve"):
            headers["Authorization"] = f"Bearer {self.token}"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session.request(
                how, f"{self.options.url}{path}", data=data, headers=headers, timeout=timeout
            ) as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0, ""
