"""A model in the kernels that serve it, with its layers in whatever formats one asks for: for measuring, offline.

No controller and no load: layers are swapped directly, and the KV cache keeps its size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from morphserve.integration import seams
from morphserve.integration.describe import RankDescription
from morphserve.integration.offline.level_engine import LevelEngine, greedy
from policies import BASE_FORMAT

_BATCH = 16  # requests that `step_time_s` decodes at once
_STEPS = 24  # that it times
_REPEATS = 3  # of a pair of step times: this machine may be busy with something else too


class ServedModel(LevelEngine):
    """An engine whose layers are put into formats past its controller."""

    def __init__(
        self, model: str, length: int, settings: Mapping[str, Any], *, enforce_eager: bool = True,
        dtype: str | None = None,
    ) -> None:  # fmt: skip
        """Start it at full precision.

        Args:
            model: directory or hub name.
            length: tokens of the longest text.
            settings: of MorphServe; says which formats there are.
            dtype: of the engine; None = the model's own.
        """
        super().__init__(
            model, settings, dtype=dtype or "auto", enforce_eager=enforce_eager, max_model_len=length + 32,
            max_num_batched_tokens=max(2048, length + 32), max_num_seqs=_BATCH, enable_prefix_caching=False,
            disable_log_stats=True,
        )  # fmt: skip
        self.description: RankDescription = self.morph.runtime.ranks[0]
        self._rows: list[torch.Tensor] = []
        seams.wrap(seams.LOGITS, self._record_logits, on=self.worker.model_runner.model)

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
        self.carry_out(wanted, self.morph.pool.num_kv_blocks)

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """Return those of every next token of a text, teacher-forced: fp32 [len(ids) - 1, vocabulary]."""
        self._rows.clear()
        self.llm.generate([{"prompt_token_ids": list(ids)}], greedy(1, prompt_logprobs=1), use_tqdm=False)
        rows = torch.cat(self._rows)[: len(ids) - 1]
        self._rows.clear()
        return rows

    def step_time_s(self) -> float:
        """Return the median time of a decode step with 16 requests."""
        for i in range(_BATCH):
            self.add([5 + i] * 32, _STEPS + 1)
        times = []
        while self.engine.has_unfinished_requests():
            times.append(self.timed_step())
        self._rows.clear()
        return statistics.median(times[1:])  # the first step is the prefill

    def step_time_factor(self, layers: Mapping[int, str]) -> float:
        """Return a decode step's time over full precision's: the median of interleaved repeats."""
        ratios = []
        for _ in range(_REPEATS):
            self.put({})
            base = self.step_time_s()
            self.put(layers)
            ratios.append(self.step_time_s() / base)
        return statistics.median(ratios)

    def _record_logits(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_logits(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            logits = original(hidden, *args, **kwargs)
            if logits is not None and len(logits) > _BATCH:  # a prompt; fewer are sampled tokens'
                self._rows.append(logits.float().log_softmax(-1))
            return logits

        return compute_logits


def measure_levels(
    model: ServedModel, levels: Sequence[Mapping[int, str]], texts: Sequence[Sequence[int]], timed: bool = False
) -> list[dict[str, float]]:
    """Return KL against full precision, perplexity and equal argmax of each level, means over all tokens of all texts.

    Args:
        levels: decoder layer id |-> format.
        texts: token ids.
        timed: also `step_time_factor`, each level beside full precision.

    Returns:
        One row a level with `kl` (nats), `top1`, `ppl`, `ppl_base`, and `step_time_factor` when timed.
    """
    sums = [{"kl": 0.0, "top1": 0.0, "nll": 0.0} for _ in levels]
    base_nll = 0.0
    for ids in texts:
        model.put({})
        base = model.log_probabilities(ids)
        target = torch.tensor(ids[1:]).unsqueeze(1)
        base_nll -= float(base.gather(1, target).sum())
        for level, row in zip(levels, sums, strict=True):
            model.put(level)
            other = model.log_probabilities(ids)
            row["kl"] += float((base.exp() * (base - other)).sum())
            row["top1"] += float((base.argmax(-1) == other.argmax(-1)).sum())
            row["nll"] -= float(other.gather(1, target).sum())
    positions = sum(len(ids) - 1 for ids in texts)
    found = []
    for level, row in zip(levels, sums, strict=True):
        means = {key: value / positions for key, value in row.items()}
        ppl = {"ppl": math.exp(means.pop("nll")), "ppl_base": math.exp(base_nll / positions)}
        factor = {"step_time_factor": model.step_time_factor(level)} if timed else {}
        found.append({**means, **ppl, **factor})
    model.put({})
    return found
