"""Processes that begin with vLLM already imported: forked from one that has done nothing else.

vLLM imports itself anew in each rank of each engine, ten seconds that show nothing; here each process of tests has one
fork server, and its ranks and the process of stock vLLM come from there. They get the environment and the core that a
spawned process would get, and share nothing else with who asked for them. The servers of test_server.py and others
start their processes as vLLM does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

# What a rank has imported before it reads a weight.
PRELOADED = [
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.engine.llm_engine",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.cpu_attn",
    "torch._inductor.compile_fx",
]


def _begin(environment: dict[str, str], target: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """First thing in the child: what a spawned process gets before its libraries are loaded."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    if cores := environment.get("OMP_PLACES", "").strip("{}"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    # Whoever comes from the server asks the same one. CPython says so, and starts another.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    forkserver.ensure_running = forkserver._forkserver.ensure_running
    target(*args, **kwargs)


class ForkedProcess(ForkServerProcess):
    """Takes the environment of the moment along."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...] = (), **others: Any) -> None:
        super().__init__(target=_begin, args=(dict(os.environ), target, *args), **others)


class ForkedContext(ForkServerContext):
    """What vLLM asks for processes, locks and pipes."""

    Process = ForkedProcess


CONTEXT = ForkedContext()
CONTEXT.set_forkserver_preload(PRELOADED)


def fork_ranks() -> None:
    """From now on, the ranks of this process's engines come from the fork server."""
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: CONTEXT
