"""What stock vLLM generates, from one process that never saw the plugin switched on and serves all tests in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

EXIT_TIMEOUT_S = 30

_process: subprocess.Popen[str] | None = None
_queue = ThreadPoolExecutor(max_workers=1)  # one job after the other


def stock_later(model: Path, rounds: list[tuple[Any, ...]], max_tokens: int = 48, **overrides: Any) -> Future[Any]:
    """What stock vLLM generates for each round; it begins now, beside the caller."""
    job = {
        "model": str(model),
        "rounds": [list(prompts) for prompts in rounds],
        "max_tokens": max_tokens,
        "engine": overrides,
        "env": {name: value for name, value in os.environ.items() if name.startswith("VLLM_")},
    }
    return _queue.submit(_ask, job)


def stock(model: Path, rounds: list[tuple[Any, ...]], max_tokens: int = 48, **overrides: Any) -> list[Any]:
    """The same, when it is there."""
    return list(stock_later(model, rounds, max_tokens, **overrides).result())


def _ask(job: dict[str, Any]) -> list[Any]:
    global _process
    if _process is None or _process.poll() is not None:
        _process = _start()
    assert _process.stdin is not None and _process.stdout is not None
    _process.stdin.write(json.dumps(job) + "\n")
    _process.stdin.flush()
    line = _process.stdout.readline()
    if not line:
        raise RuntimeError(f"stock vLLM ended with exit code {_process.wait()}; its last words are on stderr")
    answer = json.loads(line)
    if "error" in answer:
        raise RuntimeError(f"stock vLLM on {job['model']} failed:\n{answer['error']}")
    return [[(tuple(tokens), tuple(probs)) for tokens, probs in one] for one in answer["rounds"]]


def _start() -> subprocess.Popen[str]:
    script = Path(__file__).with_name("stock_run.py")
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    return subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def close() -> None:
    """End the process, whatever it is doing."""
    _queue.shutdown(wait=False, cancel_futures=True)
    if _process is None:
        return
    assert _process.stdin is not None
    _process.stdin.close()
    try:
        _process.wait(EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _process.kill()
        _process.wait()
