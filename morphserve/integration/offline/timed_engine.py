"""An engine that is stepped by hand, at a level one asks for, and says how long each step took."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams

from morphserve.config import MorphServeConfig
from morphserve.control import RankBytes, ladder_formats, optional_formats
from morphserve.errors import MorphServeError
from morphserve.profile_ladder import read_ladder
from policies import BASE_FORMAT, Decision, LayerMove, StepLoad
from quant_layers import FORMATS

_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_MAX_LONG_SEQS = 32  # more sequences are timed with short contexts only: KV for them would be half a server's
_DECODE_STEPS = 8
_WARM_STEPS = 2
_MAX_STEPS_OF_A_MOVE = 200  # of two live requests; a move takes a step for every few layers
_PREFILLS = (16, 48, 128, 320)


class _Wanted:
    """A policy that wants what it is told."""

    level = 0

    def decide(self, signals: Any) -> Decision:
        return Decision(self.level, "calibration")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the timed engine is started with, as vLLM names it."""

    model: str
    dtype: str | None  # None = the model's own
    enforce_eager: bool
    block_size: int
    max_model_len: int
    max_num_seqs: int


class TimedEngine:
    """An engine in this process, its worker in another, that times its steps.

    Its levels are: all layers in the base format, then all layers in each format of the config's ladder.
    """

    def __init__(self, options: EngineOptions, config: MorphServeConfig) -> None:
        profile = read_ladder(config)
        halves = [half for fmt in ladder_formats(config.ladder, profile) for half in fmt.split("/")]
        own = dict.fromkeys(half for half in halves if half != BASE_FORMAT)
        formats = sorted(own, key=lambda fmt: -FORMATS[fmt].bits)
        optional = optional_formats(config.ladder, profile)
        settings = config.model_dump(mode="json", exclude={"policy", "decision_log", "kv"})
        settings["ladder"] = {
            "steps": [{"format": f, "layers_per_level": 1_000_000, "optional": f in optional} for f in formats]
        }
        settings["policy"] = {"kind": "static", "level": 0}
        longest = options.max_model_len - 2 * _DECODE_STEPS - 16
        self._lengths = (16, max(longest // 2, 16))
        blocks = _MAX_LONG_SEQS * -(-(self._lengths[-1] + 2 * _DECODE_STEPS + 8) // options.block_size) + 2
        self._llm = LLM(
            options.model,
            dtype=options.dtype or "auto",
            enforce_eager=options.enforce_eager,
            block_size=options.block_size,
            num_gpu_blocks_override=max(blocks, -(-options.max_model_len // options.block_size) + 1),
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            enable_prefix_caching=False,
            disable_log_stats=True,
            # As a server has it: while the worker computes, the engine's process polls for its answer. On cores that
            # share a unit that costs nearly half of the speed (two vCPUs of one core: 65 ms a step of 16, 32 without).
            distributed_executor_backend="mp",
            additional_config={"morphserve": settings},
        )
        self._engine = self._llm.llm_engine
        self.dtype = str(self._engine.model_config.dtype).removeprefix("torch.")
        core = self._engine.engine_core.engine_core
        self._morph = core.scheduler.morph
        served = self._morph.runtime.ranks[0].kernels
        self.formats = (BASE_FORMAT, *(fmt for fmt in formats if fmt in served))  # level by level
        self.steps: dict[str, list[StepLoad]] = {fmt: [] for fmt in self.formats}
        self._decodes: dict[tuple[str, int], list[float]] = {}  # medians, in the order of the visits
        self._wanted = _Wanted()
        self._morph.controller.replace_policy(self._wanted, "calibration", self._morph.setup)
        self._seconds = 0.0
        self._step_of_core = core.step_fn
        core.step_fn = self._timed
        self._moves: dict[str, list[float]] = {"degrade": [], "restore": []}
        self._sent = 0
        self._level = 0

    def _timed(self) -> Any:
        start = time.perf_counter()
        result = self._step_of_core()
        self._seconds = time.perf_counter() - start
        return result

    def go_to(self, level: int) -> None:
        """Switch all layers, under two live requests, and note what a layer takes."""
        if level == self._level:
            return
        controller, executor = self._morph.controller, self._morph.executor
        self._add(2, 32, 400)
        executor.pauses.clear()
        before = controller.counters.num_layers_switched
        self._wanted.level = level
        for _ in range(_MAX_STEPS_OF_A_MOVE):
            if controller.level == level and not controller.in_transition:
                break
            self._engine.step()
        else:
            raise MorphServeError(
                f"level {level} not reached in {_MAX_STEPS_OF_A_MOVE} steps ({controller.status()['errors']}). The log "
                "above says what failed; calibrate again when that is repaired."
            )
        switched = controller.counters.num_layers_switched - before
        self._moves["degrade" if level > self._level else "restore"].append(sum(executor.pauses) / max(switched, 1))
        self._level = level
        self._drain()

    def visit(self) -> None:
        """Time steps of all kinds at the level that the engine is at."""
        fmt = self.formats[self._level]
        for batch in _BATCHES:
            for length in self._lengths[: 1 if batch > _MAX_LONG_SEQS else None]:
                self._add(batch, length, _DECODE_STEPS + _WARM_STEPS)
                self._record(fmt, _DECODE_STEPS)
                decodes = [step.seconds for step in self.steps[fmt][-_DECODE_STEPS:] if not step.prefill_tokens]
                self._decodes.setdefault((fmt, batch), []).append(statistics.median(decodes))
                self._drain()
        for beside in (1, 8):
            self._add(beside, 64, 4 * len(_PREFILLS) + 8)
            self._record(None, 2)
            for tokens in _PREFILLS:
                if tokens < self._lengths[-1] * 2:
                    self._add(1, tokens, 3)
                    self._record(fmt, 3)
            self._drain()

    def ratios(self, fmt: str) -> dict[int, tuple[float, float, float]]:
        """Sequences |-> what a decode step takes over one in full precision of the same round: median, least, most."""
        found = {}
        for batch in _BATCHES:
            pairs = zip(self._decodes[fmt, batch], self._decodes[BASE_FORMAT, batch], strict=True)
            of_rounds = [here / base for here, base in pairs]
            found[batch] = (statistics.median(of_rounds), min(of_rounds), max(of_rounds))
        return found

    def _record(self, fmt: str | None, count: int) -> None:
        for _ in range(count):
            self._engine.step()
            step = self._morph.monitor.last_step
            if fmt is not None and step is not None:
                self.steps[fmt].append(
                    StepLoad(self._seconds, step.num_seqs, step.prefill_tokens, step.context_tokens, self._level)
                )

    def _add(self, count: int, num_tokens: int, max_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for _ in range(count):
            self._sent += 1
            prompt = [100 + (self._sent * 31 + i) % 1000 for i in range(num_tokens)]
            self._engine.add_request(str(self._sent), {"prompt_token_ids": prompt}, params)

    def _drain(self) -> None:
        self._engine.abort_request([str(number) for number in range(max(self._sent - 64, 0), self._sent + 1)])
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def move(self) -> LayerMove:
        """Median seconds per layer, each way."""
        return LayerMove(*(statistics.median(self._moves[way] or [0.0]) for way in ("degrade", "restore")))

    def layer_bytes(self) -> RankBytes:
        """What the layers of the first rank weigh, in the formats that are timed."""
        rank = self._morph.runtime.rank_bytes[0]
        return RankBytes({fmt: tuple(rank.layers[fmt]) for fmt in self.formats}, rank.kv_block_bytes)

    def close(self) -> None:
        """Shut the engine down."""
        self._engine.engine_core.shutdown()
