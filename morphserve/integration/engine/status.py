"""What an operator may ask of an engine: plain values, for the status page and the metrics (`metrics.py`)."""

from __future__ import annotations

from typing import Any

from morphserve.integration.engine.executor import RpcExecutor
from morphserve.integration.engine.histogram import TimeHistogram
from morphserve.integration.engine.runtime import EngineRuntime
from morphserve.version import __version__


class StatusPage:
    """What is fixed at start is written down once; the rest is given at every question."""

    def __init__(self, runtime: EngineRuntime, executor: RpcExecutor, worst_forward_bytes: int) -> None:
        self._runtime = runtime
        self._executor = executor
        self._worst_forward_bytes = worst_forward_bytes
        self._ladder = [
            {
                "level": level.index,
                "num_kv_blocks": level.num_kv_blocks,
                "weight_bytes": level.weight_bytes,
                "expected_kl": level.expected_kl,
                "layers_by_format": level.layers_by_format(),
                "time_factors": {str(batch): factor for batch, factor in level.time_factors},
            }
            for level in runtime.ladder
        ]

    def render(
        self, controller: dict[str, Any], tick_times: TimeHistogram, tokens_by_level: list[int]
    ) -> dict[str, Any]:
        """Return the page.

        Args:
            controller: its own status, all of which is on the page too.
            tick_times: of the controller's part of a step.
            tokens_by_level: generated so far.
        """
        counters = controller["counters"]
        return {
            **controller,
            "engine": self._runtime.index,
            "tripped": controller["failed"],  # `failed`, by its older name
            "mapped_kv_blocks": counters["num_blocks_mapped"],
            "transitions": counters["transitions"],
            "transition_seconds": counters["transition_seconds"],
            "decisions_dropped": counters["decisions_dropped"],
            "errors": counters["errors"],
            "ladder": self._ladder,
            "controller_time": tick_times.as_json(),
            "kernels": dict(self._runtime.ranks[0].kernels),
            "kv_block_bytes": self._runtime.kv_block_bytes,
            "worst_forward_bytes": self._worst_forward_bytes,
            "tokens_by_level": {str(level): tokens for level, tokens in enumerate(tokens_by_level)},
            "quality": self._quality(tokens_by_level),
            "pause_ms": self._pauses_ms(counters["max_pause_s"]),
            "version": __version__,
        }

    def _quality(self, tokens_by_level: list[int]) -> dict[str, Any]:
        """Price the tokens so far at what their levels were measured to cost, and count those of other levels."""
        costs = [0.0, *(level["expected_kl"] for level in self._ladder[1:])]
        priced = [(tokens, cost) for tokens, cost in zip(tokens_by_level, costs, strict=True) if cost is not None]
        num_priced, nats = sum(tokens for tokens, _ in priced), sum(tokens * cost for tokens, cost in priced)
        return {
            "tokens": sum(tokens_by_level),
            "degraded_tokens": sum(tokens_by_level[1:]),
            "unpriced_tokens": sum(tokens_by_level) - num_priced,
            "expected_nats": nats,
            "expected_kl_per_token": nats / num_priced if num_priced else None,
        }

    def _pauses_ms(self, max_pause_s: float) -> dict[str, Any]:
        """Percentiles are of the latest commands, the maximum is of all."""
        pauses = sorted(self._executor.pauses)
        return {
            "count": len(pauses),
            "p50": 1e3 * pauses[len(pauses) // 2] if pauses else None,
            "max": 1e3 * max_pause_s if pauses else None,
        }
