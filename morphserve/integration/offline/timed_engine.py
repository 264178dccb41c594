"""An engine that is stepped by hand, with all its layers in one format after the other, and says what steps take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from morphserve.config import LadderConfig, LadderStep, MorphServeConfig
from morphserve.control import RankBytes, ladder_formats, optional_formats
from morphserve.errors import MorphServeError
from morphserve.integration import seams
from morphserve.integration.offline.level_engine import LevelEngine
from morphserve.integration.start import FOUND, formats_over
from morphserve.prepared import Place
from morphserve.profile_ladder import read_ladder
from policies import BASE_FORMAT, LayerMove, StepLoad
from quant_layers import FORMATS

_MAX_LONG_SEQS = 32  # more sequences are timed with short contexts only: KV for them would be half a server's
_LONG_TOKENS = 1024  # of a long context: what it costs is linear in them
_DECODE_STEPS = 8
_WARM_STEPS = 2
_PROMPT_STEPS = 6  # that the prompts of one batch may take: those that come first have their tokens meanwhile
_PATIENCE_S = 600.0  # of a move, which takes a step of two requests for every few layers
_PREFILLS = (16, 48, 128, 320, 1024, 2048, 4096, 8192)


class TimedEngine(LevelEngine):
    """An engine in this process, its worker in another, that times its steps.

    Its levels are: all layers in the base format, then all layers in each format of the config's ladder.
    """

    def __init__(
        self, model: str, config: MorphServeConfig, *, block_size: int, max_model_len: int, max_num_seqs: int,
        **arguments: Any,
    ) -> None:  # fmt: skip
        """Start it at level 0.

        Args:
            model: directory or hub name.
            config: whose formats are timed.
            block_size: tokens of a KV block.
            max_model_len: tokens of the longest request.
            max_num_seqs: of the largest step that is timed.
            arguments: others of `vllm.LLM`.
        """
        formats, steps = _one_level_each(config, _formats_over(model, arguments.get("dtype", "auto")))
        self._batches = _batches(max_num_seqs)
        longest = max_model_len - 2 * _DECODE_STEPS - 16
        self._lengths = (16, max(min(longest // 2, _LONG_TOKENS), 16))
        of_long = -(-(self._lengths[-1] + 2 * _DECODE_STEPS + 8) // block_size)
        of_short = -(-(self._lengths[0] + 2 * _DECODE_STEPS + 8) // block_size)
        blocks = max(min(max_num_seqs, _MAX_LONG_SEQS) * of_long, max_num_seqs * of_short) + 2
        super().__init__(
            model,
            _settings(config, steps),
            block_size=block_size,
            num_gpu_blocks_override=max(blocks, -(-max_model_len // block_size) + 1),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=False,
            disable_log_stats=True,
            # As a server has it: while the worker computes, the engine's process polls for its answer. On cores that
            # share a unit that costs nearly half of the speed (two vCPUs of one core: 65 ms a step of 16, 32 without).
            **{**arguments, "distributed_executor_backend": "mp"},
        )
        self.place: Place = getattr(self.engine.vllm_config, FOUND).place
        vocabulary = range(self.engine.vllm_config.model_config.get_vocab_size())
        self._tokens = vocabulary[100:1100] or vocabulary  # no token of those that steer, where there are others
        self._budget = int(self.engine.vllm_config.scheduler_config.max_num_batched_tokens)
        self._prefills = [tokens for tokens in _PREFILLS if tokens < min(longest, self._budget - 8)]
        served = self.morph.runtime.ranks[0].kernels
        self.formats = (BASE_FORMAT, *(fmt for fmt in formats if fmt in served))  # level by level
        self.steps: dict[str, list[StepLoad]] = {fmt: [] for fmt in self.formats}
        self._decodes: dict[tuple[str, int], list[float]] = {}  # medians, in the order of the visits
        self._moves: dict[str, list[float]] = {"degrade": [], "restore": []}
        self._level = 0
        self._seconds = 0.0
        seams.wrap(seams.ENGINE_CORE, self._timed, on=self.core, name="step_fn")

    def _timed(self, step: Callable[[], Any]) -> Callable[[], Any]:
        def timed_step() -> Any:
            start = time.perf_counter()
            result = step()
            self._seconds += time.perf_counter() - start
            return result

        return timed_step

    def go_to(self, level: int) -> None:
        """Switch all layers, under two live requests, and note what a layer takes.

        Raises:
            MorphServeError: the level is not reached.
        """
        if level == self._level:
            return
        counters, pauses = self.morph.controller.counters, self.morph.executor.pauses
        self._add(2, 32, 400)
        pauses.clear()
        before = counters.num_layers_switched
        self.set_level(level, _PATIENCE_S)
        switched = counters.num_layers_switched - before
        self._moves["degrade" if level > self._level else "restore"].append(sum(pauses) / max(switched, 1))
        self._level = level
        self.abort_all()

    def visit(self) -> None:
        """Time steps of all kinds at the level that the engine is at."""
        fmt = self.formats[self._level]
        for batch in self._batches:
            for length in self._lengths[: 1 if batch > _MAX_LONG_SEQS else None]:
                self._add(batch, self._within(batch, length), _PROMPT_STEPS + _DECODE_STEPS + _WARM_STEPS)
                self._decodes.setdefault((fmt, batch), []).append(self._decode_s(fmt, batch))
                self.abort_all()
        for beside in (1, 8):
            self._add(beside, min(64, self._lengths[-1]), 4 * len(self._prefills) + 8)
            self._record(None, 2)
            for tokens in self._prefills:
                self._add(1, tokens, 3)
                self._record(fmt, 3)
            self.abort_all()

    def ratios(self, fmt: str) -> dict[int, tuple[float, float, float]]:
        """Sequences |-> what a decode step takes over one in full precision of the same round: median, least, most."""
        found = {}
        for batch in self._batches:
            pairs = zip(self._decodes[fmt, batch], self._decodes[BASE_FORMAT, batch], strict=True)
            of_rounds = [here / base for here, base in pairs]
            found[batch] = (statistics.median(of_rounds), min(of_rounds), max(of_rounds))
        return found

    def _within(self, batch: int, length: int) -> int:
        """Return how long prompts may be, so that a few steps compute those of so many requests."""
        return max(min(length, _PROMPT_STEPS * max(self._budget - batch, 1) // batch), 1)

    def _decode_s(self, fmt: str, batch: int) -> float:
        """Return the median time of a decode step of the requests that were added, once their prompts are computed."""
        for _ in range(2 * _PROMPT_STEPS):
            if self._record(fmt, 1) == batch:  # with pipeline stages they may go in two batches for good
                break
        known = len(self.steps[fmt])
        self._record(fmt, _DECODE_STEPS)
        decodes = [step.seconds for step in self.steps[fmt][known:] if not step.prefill_tokens]
        if not decodes:
            raise MorphServeError(
                f"no decode step of {batch} requests could be timed in {fmt}, prompts took all of them. Give a larger "
                "--max-num-batched-tokens, or a smaller --max-num-seqs."
            )
        return statistics.median(decodes)

    def _record(self, fmt: str | None, count: int) -> int:
        """Make so many steps and note them; returns how many requests got a token in the last one."""
        outputs: list[Any] = []
        for _ in range(count):
            self._seconds = 0.0
            while self.num_requests and not (outputs := self.step()):
                pass  # with pipeline stages a call may only send a step
            if fmt is not None and (last := self.morph.monitor.last_step) is not None:
                self.steps[fmt].append(replace(last, seconds=self._seconds))
        return len(outputs)

    def _add(self, count: int, num_tokens: int, max_tokens: int) -> None:
        for _ in range(count):
            first, ids = self.num_added * 31, self._tokens
            self.add([ids[(first + i) % len(ids)] for i in range(num_tokens)], max_tokens)

    def move(self) -> LayerMove:
        """Median seconds per layer, each way."""
        return LayerMove(*(statistics.median(self._moves[way] or [0.0]) for way in ("degrade", "restore")))

    def rank_bytes(self) -> RankBytes:
        """Return what the layers weigh in the formats that are timed, all stages as one rank, of the largest slices."""
        ranks = self.morph.runtime.rank_bytes
        num_stages = self.engine.vllm_config.parallel_config.pipeline_parallel_size
        of_stages = [ranks[i * len(ranks) // num_stages].kv_block_bytes for i in range(num_stages)]
        sizes = self.layer_bytes
        return RankBytes({fmt: tuple(sizes[fmt]) for fmt in self.formats}, sum(of_stages))


def _batches(max_num_seqs: int) -> tuple[int, ...]:
    """Return 1, 2, 4 and so on, up to the largest step that a server makes."""
    return (*(2**i for i in range(max_num_seqs.bit_length()) if 2**i < max_num_seqs), max_num_seqs)


def _settings(config: MorphServeConfig, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the engine's settings: the config's, but for what would cut or move its levels."""
    own = config.model_dump(mode="json", exclude={"policy", "decision_log", "kv", "prepare", "prepared", "quality"})
    return {**own, "ladder": {"steps": steps}}


def _formats_over(model: str, dtype: str) -> tuple[str, ...]:
    """Return the formats of a default ladder over the model's own weights, which may have 8 bits."""
    from vllm.engine.arg_utils import EngineArgs

    return formats_over(EngineArgs(model=model, dtype=dtype).create_engine_config().model_config)


def _one_level_each(config: MorphServeConfig, default: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the formats of the config's ladder, widest first, and the steps of a ladder with one level for each.

    Args:
        config: the settings.
        default: of a ladder that nobody wrote down.
    """
    profile = read_ladder(config)
    if profile is None and config.ladder.steps is None:  # of all, because what has no figure yet may get one
        ladder = LadderConfig(steps=[LadderStep(format=fmt, optional=True) for fmt in default])
        config = config.model_copy(update={"ladder": ladder})
    halves = dict.fromkeys(half for fmt in ladder_formats(config.ladder, profile) for half in fmt.split("/"))
    formats = sorted((half for half in halves if half != BASE_FORMAT), key=lambda fmt: -FORMATS[fmt].bits)
    optional = optional_formats(config.ladder, profile)
    return formats, [{"format": f, "layers_per_level": 1_000_000, "optional": f in optional} for f in formats]
