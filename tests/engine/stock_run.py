"""Runs stock vLLM in a process of its own and prints what it generated: `stock_run.py MODEL JSON`.

JSON: {"rounds": [[prompt, ...], ...], "max_tokens": n}; each round is generated after the one before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine.harness import engine, generate


def main() -> None:
    job = json.loads(sys.argv[2])
    with engine(Path(sys.argv[1]), None, **job.get("engine", {})) as llm:
        rounds = [generate(llm, tuple(prompts), job["max_tokens"]) for prompts in job["rounds"]]
    sys.stdout.write("\n" + json.dumps(rounds) + "\n")


if __name__ == "__main__":
    main()
