"""Processes that begin with vLLM already imported: forked from one that has done nothing else.

vLLM imports itself anew in each rank of each engine, ten seconds that show nothing; here each process of tests has one
fork server, and its ranks and the process of stock vLLM come from there. They get the environment and the core that a
spawned process would get, and share nothing else with who asked for them. The servers of test_server.py and others
start their processes as vLLM does.
"""

from __future__ import annotations

import os
import re
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


# Where vLLM says on which cores the OpenMP library that a rank will load is to run.
_CORES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")


def _cores(environment: dict[str, str]) -> set[int]:
    """What vLLM asks for ("0 1", "...proclist=[0,1]", "{0,1}"), or else those of this process."""
    told = next((environment[name] for name in _CORES if name in environment), "")
    return {int(core) for core in re.findall(r"\d+", told)} or set(os.sched_getaffinity(0))


def _begin(
    environment: dict[str, str], cores: set[int], target: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """First thing in the child: what a spawned process gets before its libraries are loaded."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.sched_setaffinity(0, cores)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    # Whoever comes from the server asks the same one. CPython says so, and starts another.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    forkserver.ensure_running = forkserver._forkserver.ensure_running
    target(*args, **kwargs)


class ForkedProcess(ForkServerProcess):
    """Takes the environment and the cores of the moment along."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...] = (), **others: Any) -> None:
        environment = dict(os.environ)
        super().__init__(target=_begin, args=(environment, _cores(environment), target, *args), **others)


class ForkedContext(ForkServerContext):
    """What vLLM asks for processes, locks and pipes."""

    Process = ForkedProcess


CONTEXT = ForkedContext()
CONTEXT.set_forkserver_preload(PRELOADED)


def fork_ranks() -> None:
    """From now on, the ranks of this process's engines come from the fork server."""
    from vllm.v1.executor import multiproc_executor

    forkserver.ensure_running()  # now: where vLLM asks for a rank, the environment is of one core
    multiproc_executor.get_mp_context = lambda: CONTEXT
