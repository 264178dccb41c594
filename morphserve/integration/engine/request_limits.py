"""A request's own promise: `morphserve_ttft_s`, `morphserve_tpot_s` in `vllm_xargs` (offline: `extra_args`)."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from morphserve.control import NO_LIMITS, RequestLimits

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.morphserve")

TTFT_ARG = "morphserve_ttft_s"
TPOT_ARG = "morphserve_tpot_s"


def limits_of(request: Request) -> RequestLimits:
    """Return the limits that a request brought along. One that is no time is ignored: the policy's own then counts."""
    asked = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    if not asked or not (TTFT_ARG in asked or TPOT_ARG in asked):
        return NO_LIMITS
    return RequestLimits(_seconds(asked, TTFT_ARG, request), _seconds(asked, TPOT_ARG, request))


def _seconds(asked: dict[str, Any], name: str, request: Request) -> float | None:
    value = asked.get(name)
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        logger.warning(
            "morphserve: request %s: %s is %r, must be seconds above 0; the server's own limit counts",
            request.request_id, name, value,
        )  # fmt: skip
        asked.pop(name)  # said once
        return None
    return seconds
