"""Does anything add up? Bursts for half an hour, and what is resident when the server is back at level 0.

Runs an engine in this process with the demo's policy. Each cycle sends a burst of mixed requests (short and long, half
with a common beginning), which takes the level down, waits for all answers and for level 0, and compares what the
kernel says is resident with what is published. Memory beside weights and KV cache is compared between the first quarter
of the cycles and the last, by medians: the first bursts take what is taken once.

oneDNN keeps the last 1,024 kernels that it compiled, one for each shape of a batch: with stock vLLM, too, they add up
for a long time. Here it keeps 16, so that what else grows is seen (ONEDNN_PRIMITIVE_CACHE_CAPACITY for another number).

Output columns: minutes, cycles, transitions, answers, published blocks' resident bytes off by (worst so far), other
memory (MiB). Last stdout line: one JSON document.

    morphserve soak MODEL_DIR --minutes 30
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from morphserve.config import load_config
from morphserve.errors import MorphServeError
from morphserve.shipped import config_file
from morphserve.tools.checks import more_than_zero
from morphserve.tools.command import command_parser, fail, finish, say
from morphserve.user_input import read_yaml, user_path

if TYPE_CHECKING:
    from morphserve.integration.offline import LevelEngine

_BURST = 40  # requests: more than level 0's blocks hold
_IDLE_STEP_S = 0.05
_PATIENCE_S = 120.0
_LEAST_CYCLES = 8


class _Soak:
    def __init__(self, engine: LevelEngine, seed: int) -> None:
        self._engine = engine
        self._draw = random.Random(seed)
        self._common = [self._draw.randrange(100, 5000) for _ in range(96)]
        self._start = time.monotonic()
        self.num_answers = 0
        self.worst_off = 0.0
        self.other_mib: list[float] = []

    @property
    def minutes(self) -> float:
        """Since the start."""
        return (time.monotonic() - self._start) / 60

    def cycle(self) -> None:
        """Make one burst, down and back."""
        self._burst()
        self._engine.settle(0, _PATIENCE_S, _IDLE_STEP_S)  # the idle engine's steps, which a server makes by itself
        memory = self._engine.memory()
        published = self._engine.morph.pool.num_kv_blocks * self._engine.morph.runtime.kv_block_bytes
        self.worst_off = max(self.worst_off, abs(memory["kv_resident_bytes"] / published - 1))
        other = memory["anonymous"] - memory["weight_bytes"] - memory["kv_resident_bytes"]
        self.other_mib.append(other / 2**20)

    def _burst(self) -> None:
        for _ in range(_BURST):
            prompt = self._common if self._draw.random() < 0.5 else []
            length = min(300, int(self._draw.lognormvariate(4, 0.8)) + 1)
            prompt = prompt + [self._draw.randrange(100, 5000) for _ in range(length)]
            self._engine.add(prompt, self._draw.randrange(8, 90))
        self.num_answers += self._engine.finish()

    def show(self) -> None:
        """Return the columns, so far."""
        say(
            f"{self.minutes:.0f} min  {len(self.other_mib)}  {self._engine.morph.status()['transitions']}  "
            f"{self.num_answers}  {self.worst_off:.2%}  {self.other_mib[-1]:.1f}"
        )

    def document(self) -> dict[str, Any]:
        """Return what the run has found."""
        status = self._engine.morph.status()
        quarter = len(self.other_mib) // 4
        first, last = statistics.median(self.other_mib[:quarter]), statistics.median(self.other_mib[-quarter:])
        return {
            "minutes": round(self.minutes, 1),
            "cycles": len(self.other_mib),
            "answers": self.num_answers,
            "transitions": status["transitions"],
            "errors": status["errors"],
            "failed": status["failed"],
            "kv_resident_off_worst": self.worst_off,
            "other_mib_first_quarter": round(first, 2),
            "other_mib_last_quarter": round(last, 2),
            "grown_mib": round(last - first, 2),
        }


def main(argv: Sequence[str] | None = None, prog: str = "morphserve soak") -> int:
    """Send bursts until the time is over; returns the exit status."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=more_than_zero, default=30.0)
    parser.add_argument("--config", type=config_file, default=config_file("demo.yaml"), help="default: the demo's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")  # read as torch is loaded, with the engine
    try:
        load_config(args.config)  # before the engine takes its time
        document = _run(args)
    except MorphServeError as error:
        return fail(prog, error)
    finish(document)
    return int(document["failed"])


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the bursts have shown.

    Raises:
        MorphServeError: level 0 is not reached any more.
    """
    from morphserve.integration.offline import LevelEngine

    settings = read_yaml(user_path(args.config), "--config")
    with LevelEngine(
        args.model, None, additional_config={"morphserve": settings}, enforce_eager=True, num_gpu_blocks_override=49,
        max_num_seqs=64, block_size=32, max_model_len=512, disable_log_stats=True,
    ) as engine:  # fmt: skip
        soak = _Soak(engine, args.seed)
        shown = 0.0
        while soak.minutes < args.minutes or len(soak.other_mib) < _LEAST_CYCLES:
            soak.cycle()
            if soak.minutes - shown > 1:
                shown = soak.minutes
                soak.show()
        return soak.document()
