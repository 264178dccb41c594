"""What vLLM's own traces say of levels: a span for each transition, and attributes of the span of each request.

Only where vLLM traces (`--otlp-traces-endpoint`): elsewhere nothing of this is installed, and no request is looked at.

The engine knows the levels, and the API server makes the span: so they travel with the request's last output, beside
the trace context that vLLM sends with each, where no client sees them.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm import tracing

from morphserve.integration import seams
from morphserve.integration.spared import Spared

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.morphserve")

_HEADER = "morphserve"  # W3C names none that begins so, and vLLM sends none of a client's but two
_PREFIX = "morphserve."
_TRANSITION = "morphserve.transition"

_spared = Spared("the levels in a request's span")
_of_request: ContextVar[dict[str, Any]] = ContextVar("morphserve_span_of_request")


def is_traced(vllm_config: VllmConfig) -> bool:
    """Return whether vLLM traces what this engine serves."""
    asked = vllm_config.observability_config.otlp_traces_endpoint is not None
    return asked and bool(tracing.is_tracing_available())


def install() -> None:
    """Have the spans of requests tell their levels, in the process that makes them. Re-entrant."""
    seams.wrap(seams.REQUEST_SPAN, _do_tracing)
    seams.wrap(seams.REQUEST_SPAN_MAKER, _instrument_manual)


def levels_as_text(costs: Sequence[float | None], tokens: Mapping[int, int], deepest: int) -> str:
    """Return what a request's span says of its levels.

    Args:
        costs: expected KL of a token, by level; None = not known.
        tokens: of the answer, by the level that they were sampled at.
        deepest: that anything of the answer depends on, reused context too.
    """
    told: dict[str, Any] = {"level.deepest": deepest}
    if num_tokens := sum(tokens.values()):
        told |= {"level.min": min(tokens), "level.max": max(tokens)}
        told["degraded_share"] = 1 - tokens.get(0, 0) / num_tokens
        nats = [None if (cost := costs[level]) is None else count * cost for level, count in tokens.items()]
        if None not in nats:
            told["expected_kl"] = sum(each or 0.0 for each in nats) / num_tokens
    return json.dumps({_PREFIX + key: value for key, value in told.items()})


def with_levels(headers: Mapping[str, str] | None, levels: str) -> dict[str, str]:
    """Return the trace context of a request's last output, with its levels beside it."""
    return {**(headers or {}), _HEADER: levels}


class TransitionSpans:
    """Makes a span of each transition, a root of its own: no request's, and not the start's of the server.

    Never raises: the first error is said, and there are no spans of transitions from then on.
    """

    def __init__(self, engine: int) -> None:
        self._engine = engine
        self._failed = False

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Make the span of a transition that has just ended. It is sent by a thread of the tracer's."""
        if self._failed:
            return
        try:
            self._make(row)
        except Exception:
            self._failed = True
            logger.warning("morphserve: a transition's span failed, no further ones are made", exc_info=True)

    def _make(self, row: Mapping[str, Any]) -> None:
        from opentelemetry.context import Context

        end_ns = time.time_ns()
        told = {"engine": self._engine, **row}
        tracing.instrument_manual(
            span_name=_TRANSITION,
            start_time=end_ns - int(1e9 * row["seconds"]),
            end_time=end_ns,
            attributes={_PREFIX + key: value for key, value in told.items() if value not in (None, "")},
            context=Context(),
        )


def _do_tracing(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def do_tracing(self: Any, engine_core_output: Any, *args: Any, **kwargs: Any) -> None:
        levels: dict[str, Any] = {}
        with _spared:
            levels = _take_levels(engine_core_output)
        mark = _of_request.set(levels)
        try:
            original(self, engine_core_output, *args, **kwargs)
        finally:
            _of_request.reset(mark)

    return do_tracing


def _take_levels(output: Any) -> dict[str, Any]:
    """Take the levels out of what vLLM reads the trace context from; none, where an output has none."""
    headers = output.trace_headers
    if not headers or _HEADER not in headers:
        return {}
    output.trace_headers = {name: value for name, value in headers.items() if name != _HEADER} or None
    try:
        return dict(json.loads(headers[_HEADER]))
    except (ValueError, TypeError):  # of an offline user's own
        return {}


def _instrument_manual(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def instrument_manual(*args: Any, **kwargs: Any) -> None:
        with _spared:
            if "attributes" in kwargs and (levels := _of_request.get({})):
                kwargs["attributes"] = {**(kwargs["attributes"] or {}), **levels}
        original(*args, **kwargs)

    return instrument_manual
