"""Servers that we start and that die: what the user reads last is one line that says why."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cpu import replay_fakes

from morphserve.tools.bench.load.measure import _check_alive
from morphserve.tools.bench.load.server import ServerOptions, ending, serve
from morphserve.tools.workload import ReplayError

FAKE = ServerOptions(model="tiny", command=(sys.executable, replay_fakes.__file__), start_timeout_s=60)


def test_server_that_does_not_start_says_why_in_one_line(tmp_path: Path) -> None:
    """Guards diagnosis: the reason is in the log, and the user must not have to look for it."""
    log = tmp_path / "server.log"
    with pytest.raises(ReplayError) as e, serve(replace(FAKE, extra_args=("--fake", "die")), log):
        pass
    assert str(e.value) == (
        f"the server did not start: KV cache is too small: 3 blocks, limit 16 (exit code 1). Log: {log}."
    )


def test_server_that_dies_in_the_run_says_why(tmp_path: Path) -> None:
    """Guards: of a server that dies in mid run the user reads that a connection was refused, or a stack."""
    log = tmp_path / "server.log"
    with pytest.raises(ReplayError) as e, serve(FAKE, log) as server:
        with log.open("a") as stream:
            stream.write("morphserve: error: rank 0 has lost its blocks. Start again.\n")
        os.killpg(server.pid, signal.SIGKILL)
        raise aiohttp.ServerDisconnectedError
    assert str(e.value) == f"the server died in the run: rank 0 has lost its blocks. Start again. Log: {log}."


def test_killed_server_is_said_to_be_killed(tmp_path: Path) -> None:
    """Guards: memory ran out, and the user reads the last INFO line of the log."""
    log = tmp_path / "server.log"
    words = r"was killed \(SIGKILL\).*Free some memory.*Log: "
    with pytest.raises(ReplayError, match=words), serve(FAKE, log) as server:
        os.killpg(server.pid, signal.SIGKILL)
        raise ReplayError("no answer")


def test_error_beside_a_server_that_lives_is_left_alone(tmp_path: Path) -> None:
    """Guards: a full disk of the client's is reported as the death of a healthy server."""
    with pytest.raises(ReplayError, match=r"\Adisk is full\Z"), serve(FAKE, tmp_path / "server.log"):
        raise ReplayError("disk is full")


def test_log_that_is_gone_does_not_hide_the_death(tmp_path: Path) -> None:
    """Guards: a FileNotFoundError of ours in place of how the server ended."""
    assert "its log cannot be read (No such file or directory)" in ending(tmp_path / "no.log", 1, "it died")


def test_dead_engine_behind_a_living_api_process_is_no_result() -> None:
    """Guards: vLLM's API process answers 503 for seconds after its engine died, and the run counts as measured."""

    async def ask(status: int) -> None:
        async def health(_: web.Request) -> web.Response:
            return web.Response(status=status)

        app = web.Application()
        app.router.add_get("/health", health)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            async with aiohttp.ClientSession() as session:
                await _check_alive(session, f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    for alive in (200, 404):  # some servers have no such path
        asyncio.run(ask(alive))
    with pytest.raises(ReplayError, match="engine is dead.*nothing is kept"):
        asyncio.run(ask(503))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ('MorphServeError("a:\\n  b")', "name: a: b"),
        ('OSError(28, "No space left on device")', "name: [Errno 28] No space left on device. "),
    ],
)
def test_command_ends_with_one_line(error: str, line: str) -> None:
    """Guards: a command of ours ends with a stack, or with the last of several lines, which says little."""
    code = (
        "from morphserve.errors import MorphServeError\nfrom morphserve.tools.command import run_command\n"
        f"def job(): raise {error}\nraise SystemExit(run_command('name', job, 'stopped'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in done.stderr
