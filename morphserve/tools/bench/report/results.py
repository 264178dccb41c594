"""One measured run: its figures, and the files that keep it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from morphserve.files import write_whole
from morphserve.tools.bench.report.tables import Row, write_csv
from morphserve.tools.workload import Outcome, Replayed, Slo, Snapshot, bench_result, dispatch_lag, timeline, violations

# The columns of a comparison, in the order of the document on stdout.
ROW_KEYS = (
    "name", "sent", "violation_rate", "ttft_violation_rate", "tpot_violation_rate",
    "ttft_p50_s", "ttft_p95_s", "tpot_p50_ms", "tpot_p99_ms",
    "output_tok_s", "duration_s", "preemptions", "tokens_by_level", "expected_kl_per_token",
    "transitions", "level_zero_after_s", "pause_max_ms",
)  # fmt: skip

_SERVER_FIGURES = (
    "preemptions", "max_waiting", "tokens_by_level", "share_above_level_0", "expected_kl_per_token", "transitions",
    "transitions_by_outcome", "transition_s", "level_max", "level_at_end", "level_zero_after_s", "pause_max_ms",
    "kv_blocks_max", "errors",
)  # fmt: skip

# Of a snapshot, in series.csv.
_SERIES = (
    "kv_usage", "running", "waiting", "preemptions", "level", "blocks_published", "blocks_backed", "blocks_used",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen of one run, wherever it took place."""

    replayed: Replayed
    series: Sequence[Snapshot]  # in time order, from just before the first request
    status: dict[str, Any] | None  # /morphserve/status at the end
    setup: dict[str, Any]  # its circumstances


@dataclass(frozen=True, slots=True)
class RunResult:
    """What one run measured."""

    name: str
    repeat: int
    directory: Path
    slo: Slo
    replayed: Replayed
    series: Sequence[Snapshot]  # in time order, from just before the first request
    status: dict[str, Any] | None  # /morphserve/status at the end
    setup: dict[str, Any] = field(default_factory=dict)  # command, seeds, model: how to repeat it

    def figures(self) -> dict[str, Any]:
        """Return all figures of the run by name; None where it has none."""
        bench = bench_result(self.replayed, self.slo)
        latencies = {
            f"{what}_p{rank}_{unit}": bench[f"p{rank}_{what}_ms"] * scale if bench["completed"] else None
            for what, unit, scale in (("ttft", "s", 1e-3), ("tpot", "ms", 1.0), ("itl", "ms", 1.0))
            for rank in (50, 95, 99)
        }
        return {
            "name": self.name,
            **violations(self.replayed.outcomes, self.slo),
            **latencies,
            "output_tok_s": bench["output_throughput"],
            "goodput_rps": bench["request_goodput"],
            "duration_s": bench["duration"],
            "dispatch_lag": dispatch_lag(self.replayed.outcomes),
            **self._server_figures(),
        }

    def _server_figures(self) -> dict[str, Any]:
        first, last = (self.series[0], self.series[-1]) if self.series else (None, None)
        out: Row = dict.fromkeys(_SERVER_FIGURES)
        if first is None or last is None:
            return out
        if first.preemptions is not None and last.preemptions is not None:
            out["preemptions"] = last.preemptions - first.preemptions
        out["max_waiting"] = max((s.waiting for s in self.series if s.waiting is not None), default=None)
        out["kv_blocks_max"] = max(s.blocks_published or 0 for s in self.series) or None
        if last.is_morphserve:
            out |= self._morph_figures(first, last)
        return out

    def _morph_figures(self, first: Snapshot, last: Snapshot) -> dict[str, Any]:
        tokens = timeline.gained(first.tokens_by_level, last.tokens_by_level)
        moves = timeline.gained(first.transitions, last.transitions)
        total = sum(tokens.values())
        pause = last.pause_max_ms  # since the server's start: of this run only where it has grown
        if pause is None and self.status is not None:
            pause = (self.status.get("pause_ms") or {}).get("max")
        if pause is not None and pause <= (first.pause_max_ms or 0.0):
            pause = None
        return {
            "tokens_by_level": tokens,
            "share_above_level_0": 1.0 - tokens.get("0", 0) / total if total else None,
            "expected_kl_per_token": timeline.expected_kl(tokens, self.status),
            "transitions": timeline.committed(moves),
            "transitions_by_outcome": moves,
            "transition_s": None if last.transition_s is None else last.transition_s - (first.transition_s or 0.0),
            "level_max": max(s.level or 0 for s in self.series),
            "level_at_end": last.level,
            "level_zero_after_s": timeline.level_zero_after_s(self.series, timeline.level0_blocks(self.status)),
            "pause_max_ms": pause,
            "errors": timeline.gained(first.errors, last.errors),
        }

    def document(self) -> dict[str, Any]:
        """Return a superset of the result file of `vllm bench serve --save-result --save-detailed`."""
        outcomes = self.replayed.outcomes
        setup = self.setup
        return {
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai",
            "backend": "openai",
            "label": self.name,
            "model_id": setup.get("model"),
            "tokenizer_id": setup.get("tokenizer"),
            "num_prompts": len(outcomes),
            "request_rate": "inf",  # arrival times come from the trace
            "burstiness": 1.0,
            "max_concurrency": None,
            **bench_result(self.replayed, self.slo),
            "slo": {"ttft_s": self.slo.ttft_s, "tpot_s": self.slo.tpot_s},
            "figures": self.figures(),
            "statuses": [o.status for o in outcomes],
            "scheduled_s": [o.scheduled_s for o in outcomes],
            "sent_s": [o.sent_s for o in outcomes],
            "dispatch_lags": [o.lag_s for o in outcomes],
            "generated_token_ids": [o.token_ids for o in outcomes],
            "setup": setup,
            "morphserve_status": self.status,
            "series": [s.to_dict() for s in self.series],
        }

    def save(self) -> None:
        """Write requests.csv, series.csv and result.json into the run's directory; the last one whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_csv(self.directory / "requests.csv", [self._request_row(o) for o in self.replayed.outcomes])
        write_csv(self.directory / "series.csv", _series_rows(self.series))
        write_whole(self.directory / "result.json", json.dumps(self.document(), allow_nan=False))

    def _request_row(self, o: Outcome) -> Row:
        return {
            "index": o.index,
            "scheduled_s": round(o.scheduled_s, 4),
            "sent_s": _rounded(o.sent_s),
            "lag_ms": _rounded(None if o.lag_s is None else o.lag_s * 1000, 2),
            "status": o.status,
            "prompt_tokens": o.prompt_tokens,
            "asked_tokens": o.asked_tokens,
            "output_tokens": o.output_tokens,
            "ttft_s": _rounded(o.ttft_s if o.latency_s else None),
            "tpot_ms": _rounded(o.tpot_s * 1000 if o.ok else None, 2),
            "itl_max_ms": _rounded(max(o.itls_s, default=0.0) * 1000 if o.ok else None, 2),
            "e2el_s": _rounded(o.latency_s if o.ok else None),
            "ttft_ok": int(self.slo.ttft_ok(o)),
            "tpot_ok": int(self.slo.tpot_ok(o)),
            "good": int(self.slo.good(o)),
            "error": o.error.replace("\n", " ")[:200],
        }


def _series_rows(series: Sequence[Snapshot]) -> list[Row]:
    formats = dict.fromkeys(("base", *(fmt for s in series for fmt in s.layers)))
    return [
        {"t_s": round(s.t_s, 3)}
        | {name: getattr(s, name) for name in _SERIES}
        | {f"layers_{fmt}": s.layers.get(fmt) for fmt in formats}
        for s in series
    ]


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
