"""Aggregates with the definitions and names of `vllm bench serve`, and the violations it lacks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morphserve.tools.workload.outcome import Outcome, Replayed

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """The promise to a request: both must hold."""

    ttft_s: float = 2.0
    tpot_s: float = 0.150

    def ttft_ok(self, outcome: Outcome) -> bool:
        """Return whether it was answered, and its first token was in time."""
        return outcome.ok and outcome.ttft_s <= self.ttft_s

    def tpot_ok(self, outcome: Outcome) -> bool:
        """Return whether it was answered, and its tokens came fast enough."""
        return outcome.ok and outcome.tpot_s <= self.tpot_s

    def good(self, outcome: Outcome) -> bool:
        """Return whether it was answered within both limits."""
        return self.ttft_ok(outcome) and self.tpot_ok(outcome)


def violations(outcomes: Sequence[Outcome], slo: Slo) -> dict[str, Any]:
    """Return rates over requests SENT: failures, rejections, time-outs and unfinished ones are violations."""
    sent = [o for o in outcomes if o.sent_s is not None]
    num = len(sent)

    def rate(num_good: int) -> float | None:
        return 1.0 - num_good / num if num else None

    return {
        "sent": num,
        "good": sum(slo.good(o) for o in sent),
        "violation_rate": rate(sum(slo.good(o) for o in sent)),
        "ttft_violation_rate": rate(sum(slo.ttft_ok(o) for o in sent)),
        "tpot_violation_rate": rate(sum(slo.tpot_ok(o) for o in sent)),
        "statuses": dict(sorted(Counter(o.status for o in sent).items())),
    }


def bench_result(replayed: Replayed, slo: Slo) -> dict[str, Any]:
    """Return the keys of `vllm bench serve --save-result --save-detailed`; lists in s, aggregates in ms."""
    outcomes, duration = replayed.outcomes, replayed.duration_s
    done = [o for o in outcomes if o.ok]
    total_input = sum(o.prompt_tokens for o in done)
    total_output = sum(o.output_tokens for o in done)
    peak_tokens, peak_requests = _peaks(done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(slo.good(o) for o in done) / duration,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "input_lens": [o.prompt_tokens for o in outcomes],
        "output_lens": [o.output_tokens if o.ok else 0 for o in outcomes],
        "ttfts": [o.ttft_s for o in outcomes],
        "itls": [o.itls_s for o in outcomes],
        "latencies": [o.latency_s for o in outcomes],
        "start_times": [replayed.started + (o.sent_s or 0.0) for o in outcomes],
        "queue_times": [0.0 for _ in outcomes],  # open loop: no client-side semaphore to wait for
        "generated_texts": [o.text for o in outcomes],
        "errors": [o.error for o in outcomes],
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "rtfx": 0.0,  # audio only
    }
    result |= _statistics("ttft", [o.ttft_s for o in done])
    result |= _statistics("tpot", [o.tpot_s for o in done if o.output_tokens > 1])
    result |= _statistics("itl", [gap for o in done for gap in o.itls_s])
    result |= _statistics("e2el", [o.latency_s for o in done])
    return result


def dispatch_lag(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Return how late the client sent: a large lag means the client, not the server, was measured."""
    lags = [o.lag_s for o in outcomes if o.lag_s is not None]
    if not lags:
        return {"mean_ms": None, "p99_ms": None, "max_ms": None}
    return {
        "mean_ms": float(np.mean(lags)) * 1000,
        "p99_ms": float(np.percentile(lags, 99)) * 1000,
        "max_ms": max(lags) * 1000,
    }


def _statistics(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return mean, median, std and percentiles in ms; 0 where there are no values, as vLLM has it."""
    ms = np.asarray(values if len(values) else [0.0]) * 1000
    out = {
        f"mean_{name}_ms": float(ms.mean()),
        f"median_{name}_ms": float(np.median(ms)),
        f"std_{name}_ms": float(ms.std()),
    }
    return out | {f"p{p}_{name}_ms": float(np.percentile(ms, p)) for p in PERCENTILES}


def _peaks(done: Sequence[Outcome]) -> tuple[float, int]:
    """Return the most tokens, and the most requests alive, in any one second."""
    if not done:
        return 0.0, 0
    begins = [o.sent_s or 0.0 for o in done]
    first = min(begins)
    seconds = math.ceil(max(b + o.latency_s for b, o in zip(begins, done, strict=True)) - first) + 1
    tokens, alive = np.zeros(seconds), np.zeros(seconds)
    for begin, outcome in zip(begins, done, strict=True):
        at = begin - first + outcome.ttft_s
        for gap in (0.0, *outcome.itls_s):
            at += gap
            tokens[min(int(at), seconds - 1)] += 1
        alive[int(begin - first) : int(begin - first + outcome.latency_s) + 1] += 1
    return float(tokens.max()), int(alive.max())
