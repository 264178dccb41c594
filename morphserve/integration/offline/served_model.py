"""A model in the kernels that serve it, with its layers in whatever formats one asks for: for measuring, offline.

No controller and no load: layers are swapped directly, and the KV cache keeps its size.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams

from morphserve.integration.describe import RankDescription
from morphserve.integration.worker.worker import rank_layers
from policies import BASE_FORMAT

_BATCH = 16  # requests that `step_time_s` decodes at once


class ServedModel:
    """An engine in this process. Close it."""

    def __init__(
        self, model: str, length: int, settings: Mapping[str, Any], *, enforce_eager: bool = True,
        dtype: str | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            model: directory or hub name.
            length: tokens of the longest text.
            settings: of MorphServe; says which formats there are.
            dtype: of the engine; None = the model's own.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the logits are read inside the worker
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self._llm = LLM(
            model,
            dtype=dtype or "auto",
            enforce_eager=enforce_eager,
            max_model_len=length + 32,
            max_num_batched_tokens=max(2048, length + 32),
            max_num_seqs=_BATCH,
            enable_prefix_caching=False,
            disable_log_stats=True,
            additional_config={"morphserve": {**settings, "policy": {"kind": "static", "level": 0}}},
        )
        core = self._llm.llm_engine.engine_core.engine_core
        self._layers = rank_layers()
        self.description: RankDescription = self._layers.describe()
        self._rows: list[torch.Tensor] = []
        self._record_logits(core.model_executor.driver_worker.worker.model_runner.model)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.description.layer_bytes[BASE_FORMAT])

    @property
    def tokenizer(self) -> Any:
        """The model's own."""
        return self._llm.get_tokenizer()

    def put(self, layers: Mapping[int, str]) -> None:
        """These layers in these formats, all others at full precision."""
        assert self._layers.swapper is not None
        self._layers.prepare({layer: layers.get(layer, BASE_FORMAT) for layer in range(self.num_layers)})
        self._layers.swapper.commit()

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """Of every next token of a text, teacher-forced: fp32 [len(ids) - 1, vocabulary]."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        self._rows.clear()
        self._llm.generate([{"prompt_token_ids": list(ids)}], params, use_tqdm=False)
        rows = torch.cat(self._rows)[: len(ids) - 1]
        self._rows.clear()
        return rows

    def step_time_s(self, steps: int = 24) -> float:
        """Median time of a decode step with 16 requests."""
        engine = self._llm.llm_engine
        params = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
        for i in range(_BATCH):
            engine.add_request(f"{time.monotonic_ns()}-{i}", {"prompt_token_ids": [5 + i] * 32}, params)
        times = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        self._rows.clear()
        return statistics.median(times[1:])  # the first step is the prefill

    def close(self) -> None:
        """Shut the engine down."""
        self._llm.llm_engine.engine_core.shutdown()

    def _record_logits(self, model: Any) -> None:
        original = model.compute_logits

        def compute_logits(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            logits = original(hidden, *args, **kwargs)
            if logits is not None and len(logits) > _BATCH:  # a prompt; fewer are sampled tokens'
                self._rows.append(logits.float().log_softmax(-1))
            return logits

        model.compute_logits = compute_logits


def measure_rungs(
    model: ServedModel, rungs: Sequence[Mapping[int, str]], texts: Sequence[Sequence[int]], timed: bool = False
) -> list[dict[str, float]]:
    """KL against full precision, perplexity and equal argmax of each rung, means over all tokens of all texts.

    Args:
        rungs: decoder layer id |-> format.
        texts: token ids.
        timed: also `step_time_factor`, each rung beside full precision.

    Returns:
        One row a rung with `kl` (nats), `top1`, `ppl`, `ppl_base`, and `step_time_factor` when timed.
    """
    sums = [{"kl": 0.0, "top1": 0.0, "nll": 0.0} for _ in rungs]
    base_nll, positions = 0.0, 0
    for ids in texts:
        model.put({})
        base = model.log_probabilities(ids)
        target = torch.tensor(ids[1:]).unsqueeze(1)
        positions += len(base)
        base_nll -= float(base.gather(1, target).sum())
        for rung, row in zip(rungs, sums, strict=True):
            model.put(rung)
            other = model.log_probabilities(ids)
            row["kl"] += float((base.exp() * (base - other)).sum())
            row["top1"] += float((base.argmax(-1) == other.argmax(-1)).sum())
            row["nll"] -= float(other.gather(1, target).sum())
    ppl = [float(torch.tensor(row.pop("nll") / positions).exp()) for row in sums]
    found = [
        {"kl": row["kl"] / positions, "top1": row["top1"] / positions, "ppl": p, "ppl_base": _exp(base_nll / positions)}
        for row, p in zip(sums, ppl, strict=True)
    ]
    if timed:
        for rung, figures in zip(rungs, found, strict=True):
            figures["step_time_factor"] = _step_time_factor(model, rung)
    model.put({})
    return found


def _step_time_factor(model: ServedModel, rung: Mapping[int, str], repeats: int = 3) -> float:
    """Median of interleaved repeats: this machine may be busy with something else too."""
    ratios = []
    for _ in range(repeats):
        model.put({})
        base = model.step_time_s()
        model.put(rung)
        ratios.append(model.step_time_s() / base)
    return statistics.median(ratios)


def _exp(value: float) -> float:
    return float(torch.tensor(value).exp())
