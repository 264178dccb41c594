"""A request's own promise: `morphserve_ttft_s`, `morphserve_tpot_s` in `vllm_xargs` (offline: `extra_args`).

And what came of promises, a request's own or the policy's, as far as the engine sees it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any

from morphserve.control import NO_LIMITS, RequestLimits
from policies import Promise

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.morphserve")

TTFT_ARG = "morphserve_ttft_s"
TPOT_ARG = "morphserve_tpot_s"
_warned: set[str] = set()  # of these two, that somebody has sent what is no time
_RECENT_S = 300.0  # an hour after a burst it is no longer what the server does now


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
    except (TypeError, ValueError, OverflowError):  # the last of an int that no float can be
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        logger.log(
            logging.DEBUG if name in _warned else logging.WARNING,  # clients may send as many as they like
            "morphserve: request %.80r: %s is %.80r, must be seconds above 0; the server's own limit counts",
            request.request_id, name, value,
        )  # fmt: skip
        _warned.add(name)
        asked.pop(name)  # said once a request
        return None
    return seconds


class LateCount:
    """The requests that have ended, and those among them that were late. Constant cost per event.

    Times are the engine's: from the arrival that vLLM stamped to the step that made a token. The way to the client, and
    requests that were refused at the door, are not in it. Judged is what was late by the time it ended, and what had a
    token by then: how it ended says nothing, as vLLM aborts an answer at a stop string, too.
    """

    def __init__(self, promise: Promise, num_recent: int = 100) -> None:
        """Count from now on. `promise`: by which requests are judged; may be replaced at any time."""
        self.promise = promise
        self._first_token_s: dict[str, float] = {}  # live request |-> wall clock
        self._num_ended = 0
        self._num_judged = 0
        self._late = {"ttft": 0, "tpot": 0, "any": 0}
        self._recent: deque[tuple[float, bool]] = deque(maxlen=num_recent)  # when each was judged, and how

    def on_first_token(self, request: Request, wall_s: float) -> None:
        """Note when a live request got its first token."""
        self._first_token_s[request.request_id] = wall_s

    def on_finish(self, request: Request, wall_s: float) -> None:
        """Judge a request that ends."""
        first_s = self._first_token_s.pop(request.request_id, wall_s)  # the first token may have been the last
        self._num_ended += 1
        asked, promise = limits_of(request), self.promise
        ttft_limit_s = promise.own_ttft_s(asked.ttft_s) or promise.ttft_s
        tpot_limit_s = promise.own_tpot_s(asked.tpot_s) or promise.tpot_s
        if ttft_limit_s is None and tpot_limit_s is None:
            return
        num_gaps = request.num_output_tokens - 1
        late = {
            "ttft": ttft_limit_s is not None and first_s - request.arrival_time > ttft_limit_s,
            "tpot": tpot_limit_s is not None and num_gaps > 0 and (wall_s - first_s) / num_gaps > tpot_limit_s,
        }
        late["any"] = any(late.values())
        if late["any"] or request.num_output_tokens > 0:
            self._num_judged += 1
            self._recent.append((wall_s, late["any"]))
            for name, is_late in late.items():
                self._late[name] += is_late

    def as_json(self, wall_s: float) -> dict[str, Any]:
        """Return the counts, and the limits of requests that bring none."""
        recent = [late for when_s, late in self._recent if when_s > wall_s - _RECENT_S]
        return {
            "ttft_s": self.promise.ttft_s,
            "tpot_s": self.promise.tpot_s,
            "num_ended": self._num_ended,
            "num_judged": self._num_judged,
            "num_late": self._late["any"],
            "num_late_ttft": self._late["ttft"],
            "num_late_tpot": self._late["tpot"],
            "recent": {"num_judged": len(recent), "num_late": sum(recent)},
        }
