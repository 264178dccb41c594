"""An API server knows when its engines have nothing to do, and how what is missing is made for this very server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cpu.prepared_world import keep_profile, make_model, store_of
from seams.test_prepared_start import LLAMA, start
from seams.test_prepared_start import plugin as plugin  # noqa: F401  a fixture

from morphserve.integration.server import spare_time
from morphserve.integration.server.spare_time import SpareTime
from morphserve.integration.start import FOUND, IdleWork, idle_work
from morphserve.prepared import ProfileKey
from morphserve.tools.prepare.cli import _parser

pytestmark = pytest.mark.seams

WHEN_IDLE = {"prepare": "when_idle"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = make_model(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return directory


def work_of(config: Any) -> IdleWork:
    found = idle_work(config)
    assert found is not None
    return found


def test_nothing_is_done_unasked(model: Path, tmp_path: Path) -> None:
    """Guards: a child beside a server whose settings do not ask for one."""
    assert idle_work(start(model, tmp_path / "cache")) is None


def test_the_child_prepares_for_this_very_server(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a profile of another dtype, of other ranks or into another directory; an option that `morphserve prepare`
    does not have; a child that writes into files of the server, or wants all of the server's KV cache beside it."""
    monkeypatch.setenv("MORPHSERVE_ENDING_FILE", str(tmp_path / "end"))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv("HOME_OF_MINE", "h")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    cache = tmp_path / "cache"
    work = work_of(start(model, cache, WHEN_IDLE, dtype="float32", enforce_eager=True))
    assert work.command[3] == str(os.getpid())
    args = _parser("prepare").parse_args(work.command[4:])
    assert (Path(args.model), args.dtype, args.cache_dir, args.max_model_len) == (model, "float32", cache, 128)
    assert (args.tensor_parallel_size, args.pipeline_parallel_size) == (1, 1)
    assert args.enforce_eager and args.without_times
    assert work_of(start(model, cache, WHEN_IDLE)).command[-1] != "--enforce-eager"
    assert not {"MORPHSERVE_ENDING_FILE", "PROMETHEUS_MULTIPROC_DIR"} & set(work.environment)
    assert work.environment["HOME_OF_MINE"] == "h" and work.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_the_child_runs_nothing_that_lies_where_the_server_stands(model: Path, tmp_path: Path) -> None:
    """Guards: a module that anybody has put into a directory in which a server was started, as /tmp."""
    work = work_of(start(model, tmp_path / "cache", WHEN_IDLE))
    (tmp_path / "argparse.py").write_text("raise SystemExit('planted')")
    done = subprocess.run([*work.command, "--help"], cwd=tmp_path, env=work.environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--tensor-parallel-size" in done.stdout, done.stderr


def test_what_is_there_is_not_made(model: Path, tmp_path: Path) -> None:
    """Guards: a server that prepares anew at each start; one that takes another dtype's profile for its own."""
    cache = tmp_path / "cache"
    place = getattr(start(model, cache), FOUND).place
    keep_profile(store_of(model, cache), ProfileKey(("w8", "w4"), "float16", place.tier))
    assert work_of(start(model, cache, WHEN_IDLE)).command
    keep_profile(store_of(model, cache), ProfileKey(("w8", "w4"), place.dtype, place.tier))
    work = work_of(start(model, cache, WHEN_IDLE))
    assert not work.command and not work.is_missing


@pytest.mark.parametrize("what", ["gpu", "dummy", "gone", "doors"])
def test_where_it_cannot_be_it_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Guards: an operator who waits for ever for a profile that this server can never make."""
    config = start(model, tmp_path / "cache", WHEN_IDLE, **({"load_format": "dummy"} if what == "dummy" else {}))
    if what == "gpu":
        monkeypatch.setattr("morphserve.integration.start.idle.is_cuda", lambda: True)
    elif what == "gone":
        (model / "model-0.safetensors").unlink()
    elif what == "doors":
        config.parallel_config._api_process_count = 2
    work = work_of(config)
    said = {"gpu": "memory is this server's", "dummy": "not the weights", "gone": "not on this machine",
            "doors": "several API servers"}[what]  # fmt: skip
    assert said in work.why_not and "`morphserve prepare" in work.why_not and work.is_missing and not work.command


class FakeWhenIdle:
    """Remembers what it was told, and raises when a test wants it."""

    def __init__(self, start: Any, model: str) -> None:
        self.ticks: list[bool] = []
        self.num_closed = 0
        self.error: Exception | None = None

    def tick(self, is_busy: bool) -> None:
        self.ticks.append(is_busy)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.num_closed += 1

    def as_json(self) -> dict[str, Any]:
        return {"state": "idle"}


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A watch over a client with `num_open` requests, and what it tells."""
    monkeypatch.setattr(spare_time, "WhenIdle", FakeWhenIdle)
    monkeypatch.setattr(spare_time, "idle_work", lambda config: IdleWork(("true",)))
    client = SimpleNamespace(num_open=0, vllm_config=SimpleNamespace(model_config=SimpleNamespace(model="m")))
    client.get_num_unfinished_requests = lambda: client.num_open
    found: Any = SpareTime(client)
    return found


def ticks(spare: Any, num_ticks: int = 1) -> list[bool]:
    """Let the watch look so often, and end it as a server does."""

    async def watch() -> None:
        task = asyncio.create_task(spare.run())
        while len(spare._preparation.ticks) < num_ticks and not task.done():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    spare._preparation.ticks.clear()
    asyncio.run(watch())
    return list(spare._preparation.ticks)


def status(tokens: int = 0, running: int = 0, waiting: int = 0) -> dict[str, Any]:
    return {"quality": {"tokens": tokens}, "num_running": running, "num_waiting": waiting}


def test_who_is_served_is_seen(spare: Any) -> None:
    """Guards: a child beside a request that the engine has, that it has not yet, that came and went between two
    looks, or that another engine has; and one while nobody knows how the engines are."""
    assert ticks(spare) == [True], "the engines have not answered yet"
    spare.look([status(), status()])
    spare.look([status(), status()])
    assert ticks(spare) == [False]
    for busy in (status(running=1), status(waiting=1), status(tokens=6)):
        spare.look([status(), busy])
        assert ticks(spare) == [True]
        spare.look([status(tokens=5), status()])
        spare.look([status(tokens=5), status()])
        assert ticks(spare) == [False]
    spare._client.num_open = 1
    assert ticks(spare) == [True]
    for _ in range(2):
        spare.look([])
    spare._client.num_open = 0
    assert ticks(spare) == [True]


def test_it_ends_with_the_server_and_after_an_error(spare: Any, caplog: pytest.LogCaptureFixture,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Guards: a child that nobody watches any more."""
    ticks(spare)
    assert spare._preparation.num_closed == 1
    monkeypatch.setattr(spare_time, "logger", logging.getLogger("test.spare_time"))
    spare._preparation.error = RuntimeError("broken")
    ticks(spare, 2)
    assert spare._preparation.num_closed > 1 and "goes on without it" in caplog.text


def test_the_status_says_what_it_is_at(spare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server whose operator cannot see what it does; settings that are damaged when it looks."""
    assert spare.as_json() == {"state": "idle"}
    client = spare._client
    for work, state in ((IdleWork(why_not="there"), "done"), (IdleWork(why_not="a GPU", is_missing=True), "off")):
        monkeypatch.setattr(spare_time, "idle_work", lambda config, work=work: work)
        assert SpareTime(client).as_json() == {"state": state, "part": "", "note": work.why_not, "begins_in_s": None}
    monkeypatch.setattr(spare_time, "idle_work", lambda config: None)
    assert SpareTime(client).as_json() is None

    def damaged(config: Any) -> None:
        raise ValueError("bad YAML")

    monkeypatch.setattr(spare_time, "idle_work", damaged)
    assert SpareTime(client).as_json() is None
