"""Runs stock vLLM in a process of its own, which takes jobs from a pipe and answers one after the other.

Every job has an engine of its own; what they share is the time it takes to import vLLM.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What stock vLLM is to generate."""

    model: Path
    rounds: list[list[Any]]  # of prompts; each round is generated after the one before
    max_tokens: int
    engine: dict[str, Any]
    env: dict[str, str]  # all variables of vLLM's


def run(job: Job) -> list[Any]:
    """(tokens, logprobs) of each prompt of each round."""
    from engine.harness import engine, generate
    from vllm import envs

    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        del os.environ[name]
    os.environ.update(job.env)
    envs.disable_envs_cache()
    with engine(job.model, None, **job.engine) as llm:
        return [generate(llm, tuple(prompts), job.max_tokens) for prompts in job.rounds]


def serve(jobs: Connection) -> None:
    """Answers a `Job` with its rounds, or with the words of an exception; ends with the pipe."""
    os.dup2(2, 1)  # vLLM and its workers print; under xdist, stdout is not ours
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            sys.exit()
        try:
            jobs.send(run(job))
        except Exception:
            jobs.send(traceback.format_exc())
