"""Runs stock vLLM in a process of its own: a line of JSON on stdin is one job, its answer one line on stdout.

Job: {"model": path, "rounds": [[prompt, ...], ...], "max_tokens": n, "engine": {...}, "env": {...}}; each round is
generated after the one before. Every job has an engine of its own; what they share is the time it takes to import vLLM.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from engine.harness import engine, generate
from vllm import envs


def run(job: dict[str, Any]) -> list[Any]:
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        del os.environ[name]
    os.environ.update(job["env"])
    envs.disable_envs_cache()
    with engine(Path(job["model"]), None, **job["engine"]) as llm:
        return [generate(llm, tuple(prompts), job["max_tokens"]) for prompts in job["rounds"]]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its workers print; answers have a way of their own
    for line in sys.stdin:
        try:
            answer = {"rounds": run(json.loads(line))}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
