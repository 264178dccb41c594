"""A model in the kernels that serve it, with its layers in whatever formats one asks for: for measuring, offline.

No controller and no load: layers are swapped directly, and the KV cache keeps its size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from morphserve.integration.describe import RankDescription
from morphserve.integration.offline import logit_meter
from morphserve.integration.offline.level_engine import LevelEngine, greedy
from policies import BASE_FORMAT

_BATCH = 16  # requests that `step_time_s` decodes at once
_STEPS = 24  # that it times
_REPEATS = 3  # of a pair of step times: this machine may be busy with something else too
# Nobody waits for an answer here, so what a server would give up is waited for: five layers of a model of 1.5 billion
# weights in fp32 are 0.9 GB to read, from a disk if memory is short.
_RANK_TIMEOUT_S = 1800.0


class ServedModel(LevelEngine):
    """An engine whose layers are put into formats past its controller, on each of its ranks."""

    def __init__(
        self, model: str, length: int, settings: Mapping[str, Any], *, enforce_eager: bool = True,
        dtype: str | None = None, **arguments: Any,
    ) -> None:  # fmt: skip
        """Start it at full precision.

        Args:
            model: directory or hub name.
            length: tokens of the longest text.
            settings: of MorphServe; says which formats there are.
            enforce_eager: not compiled.
            dtype: of the engine; None = the model's own.
            arguments: others of `vllm.LLM`.
        """
        transition = {"rank_timeout_s": _RANK_TIMEOUT_S, **(settings.get("transition") or {})}
        super().__init__(
            model, {**settings, "transition": transition}, dtype=dtype or "auto", enforce_eager=enforce_eager,
            max_model_len=length + 32, max_num_batched_tokens=max(2048, length + 32), max_num_seqs=_BATCH,
            enable_prefix_caching=False, disable_log_stats=True, **arguments,
        )  # fmt: skip
        self.description: RankDescription = self.morph.runtime.ranks[0]
        self._formats: dict[int, str] = {}  # decoder layer id |-> what it is in now; level 0 where nothing is said
        self._num_kv_blocks = self.morph.pool.num_kv_blocks
        self._on_ranks(logit_meter.install, _BATCH + 1)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.description.layer_bytes[BASE_FORMAT])

    @property
    def tokenizer(self) -> Any:
        """The model's own."""
        return self.llm.get_tokenizer()

    def put(self, layers: Mapping[int, str]) -> None:
        """Put these layers in these formats, all others in full precision."""
        wanted = {layer: layers.get(layer, BASE_FORMAT) for layer in range(self.num_layers)}
        changed = [layer for layer, fmt in wanted.items() if self._formats.get(layer, BASE_FORMAT) != fmt]
        most = self.morph.runtime.stated.transition.layers_per_step  # that a rank has memory to stage
        for start in range(0, len(changed), most):
            self.carry_out({layer: wanted[layer] for layer in changed[start : start + most]}, self._num_kv_blocks)
        self._formats = wanted

    def compare(self, ids: Sequence[int], is_base: bool) -> dict[str, float]:
        """Return what a text's next tokens are, teacher-forced; see `logit_meter.take`."""
        self._on_ranks(logit_meter.clear)
        self.llm.generate([{"prompt_token_ids": list(ids)}], greedy(1, prompt_logprobs=1), use_tqdm=False)
        return next(sums for sums in self._on_ranks(logit_meter.take, list(ids), is_base) if sums is not None)

    def step_time_s(self) -> float:
        """Return the median time of a decode step with 16 requests."""
        for i in range(_BATCH):
            self.add([5 + i] * 32, _STEPS + 1)
        ends = []
        while self.engine.has_unfinished_requests():
            if self.step():  # with pipeline stages a call may only send a step
                ends.append(time.perf_counter())
        return statistics.median(after - before for before, after in pairwise(ends))

    def step_time_factor(self, layers: Mapping[int, str]) -> float:
        """Return a decode step's time over full precision's: the median of interleaved repeats."""
        ratios = []
        for _ in range(_REPEATS):
            self.put({})
            base = self.step_time_s()
            self.put(layers)
            ratios.append(self.step_time_s() / base)
        return statistics.median(ratios)

    def _on_ranks(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        found: list[Any] = self.engine.collective_rpc(function, args=args)
        return found


def measure_levels(
    model: ServedModel, levels: Sequence[Mapping[int, str]], texts: Sequence[Sequence[int]], timed: bool = False,
    on_level: Callable[[], Any] = lambda: None,
) -> list[dict[str, float]]:  # fmt: skip
    """Return KL against full precision, perplexity and equal argmax of each level, means over all tokens of all texts.

    The model is left at whatever was measured last.

    Args:
        levels: decoder layer id |-> format.
        texts: token ids.
        timed: also `step_time_factor`, each level beside full precision.
        on_level: called when one is done for one text, and when it is timed.

    Returns:
        One row a level with `kl` (nats), `top1`, `ppl`, `ppl_base`, and `step_time_factor` when timed.
    """
    sums = [{"kl": 0.0, "top1": 0.0, "nll": 0.0} for _ in levels]
    base_nll = 0.0
    for ids in texts:
        model.put({})
        base_nll += model.compare(ids, is_base=True)["nll"]
        for level, row in zip(levels, sums, strict=True):
            model.put(level)
            for key, value in model.compare(ids, is_base=False).items():
                row[key] += value
            on_level()
    positions = sum(len(ids) - 1 for ids in texts)
    found = []
    for level, row in zip(levels, sums, strict=True):
        means = {key: value / positions for key, value in row.items()}
        ppl = {"ppl": math.exp(means.pop("nll")), "ppl_base": math.exp(base_nll / positions)}
        factor = {}
        if timed:
            factor = {"step_time_factor": model.step_time_factor(level)}
            on_level()
        found.append({**means, **ppl, **factor})
    return found
