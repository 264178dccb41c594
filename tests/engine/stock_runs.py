"""What stock vLLM generates, from one process that never saw the plugin switched on and serves all tests in turn."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine import stock_run
from engine.forked import CONTEXT, ForkedProcess

EXIT_TIMEOUT_S = 30

_process: tuple[ForkedProcess, Connection] | None = None
_queue = ThreadPoolExecutor(max_workers=1)  # one job after the other


def stock_later(model: Path, rounds: list[tuple[Any, ...]], max_tokens: int = 48, **overrides: Any) -> Future[Any]:
    """What stock vLLM generates for each round; it begins now, beside the caller."""
    env = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    return _queue.submit(_ask, stock_run.Job(model, [list(prompts) for prompts in rounds], max_tokens, overrides, env))


def stock(model: Path, rounds: list[tuple[Any, ...]], max_tokens: int = 48, **overrides: Any) -> list[Any]:
    """The same, when it is there."""
    return list(stock_later(model, rounds, max_tokens, **overrides).result())


def _ask(job: stock_run.Job) -> list[Any]:
    global _process
    if _process is None or not _process[0].is_alive():
        _process = _start()
    process, pipe = _process
    try:
        pipe.send(job)
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise RuntimeError(f"stock vLLM ended, exit code {process.exitcode}; its last words are on stderr") from None
    if isinstance(answer, str):
        raise RuntimeError(f"stock vLLM on {job.model} failed:\n{answer}")
    return list(answer)


def _start() -> tuple[ForkedProcess, Connection]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=stock_run.serve, args=(theirs,), name="stock vLLM")
    process.start()
    theirs.close()
    return process, ours


def close() -> None:
    """End the process, whatever it is doing."""
    _queue.shutdown(wait=False, cancel_futures=True)
    if _process is None:
        return
    process, pipe = _process
    pipe.close()
    process.join(EXIT_TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
