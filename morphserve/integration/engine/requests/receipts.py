"""What a request's answer depends on, told with the answer: a receipt.

A request asks with vLLM's `vllm_xargs` (offline: `SamplingParams.extra_args`): `morphserve_receipt: 1`, or `"tokens"`
to be told the level of each token too; or `morphserve_precision: "full"`, which also keeps KV that quantized layers
wrote out of its context as far as it comes from the prefix cache. The receipt comes back in the field
`kv_transfer_params` of the last output, under "morphserve": the only field that vLLM hands from the scheduler to the
client untouched. From there the API server puts it into streams and headers, too (server/receipt_door.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from morphserve.integration import spans
from morphserve.integration.engine.provenance import Provenance

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.morphserve")

RECEIPT_ARG = "morphserve_receipt"
PRECISION_ARG = "morphserve_precision"
FULL = "full"
TOKENS = "tokens"
_MAX_RUNS = 1000  # of tokens at one level that a receipt tells apart: a level lives for many steps


@dataclass(slots=True)
class _Draft:
    """Counts of a live request. Levels are the effective levels of the steps.

    What a request has computed and got is counted when the level changes, and when it ends: between two changes all of
    it is of one level.
    """

    request: Any
    demands_full: bool
    tells_tokens: bool
    is_asked: bool = True  # by the client; else for the trace alone
    error: str = ""
    num_preemptions: int = -1  # at which this life of the request began; -1 = it has not begun
    num_computed_tokens: int = 0  # that are counted
    num_output_tokens: int = 0  # likewise
    is_continued: bool = False  # a session's, that has context from turns before
    reused: dict[int, int] = field(default_factory=dict)  # deepest level |-> tokens taken from the prefix cache
    computed: dict[int, int] = field(default_factory=dict)  # level |-> tokens whose KV was computed
    output: dict[int, int] = field(default_factory=dict)  # level |-> tokens sampled
    runs: list[list[int]] = field(default_factory=list)  # the same in order: level, tokens

    def count_computed(self, level: int, num_ahead: int = 0) -> None:
        """Count what was computed at `level` since the last time; not the last `num_ahead` tokens."""
        new = self.request.num_computed_tokens - num_ahead - self.num_computed_tokens
        if new > 0:  # a preempted request has lost what it had
            self.computed[level] = self.computed.get(level, 0) + new
            self.num_computed_tokens += new

    def count_output(self, level: int) -> None:
        """Count what was sampled at `level` since the last time."""
        if new := self.request.num_output_tokens - self.num_output_tokens:
            self.output[level] = self.output.get(level, 0) + new
            self.num_output_tokens += new
            self._run(level, new)

    def _run(self, level: int, new: int) -> None:
        """Append to the run, or begin another; beyond what a receipt holds the last one takes all, at its deepest."""
        if self.runs and (self.runs[-1][0] == level or len(self.runs) == _MAX_RUNS):
            self.runs[-1] = [max(self.runs[-1][0], level), self.runs[-1][1] + new]
        else:
            self.runs.append([level, new])


class Receipts:
    """Of the requests that asked for one, and where vLLM traces of all; the others cost nothing.

    A step costs what is new in it. Only where the level changes those that have begun are walked through.
    """

    def __init__(self, provenance: Provenance, block_size: int) -> None:
        self._provenance = provenance
        self._block_size = block_size
        self._drafts: dict[str, _Draft] = {}
        self._begun: dict[str, _Draft] = {}  # those that have been scheduled, preempted ones too
        self._level = 0  # of the step that was scheduled last
        self._level_of_outputs = 0  # of the step whose tokens came last
        self._sealed: dict[str, dict[str, Any]] = {}  # ended in the step whose outputs are being made
        self._has_warned = False  # of a precision that is not known
        self._traced: dict[str, str] = {}  # likewise: what their spans say
        self.span_text: Callable[[Mapping[int, int], int], str] | None = None  # makes that; None = vLLM does not trace

    def on_arrival(self, request: Request) -> None:
        """Look at what the request asks for."""
        params = getattr(request, "sampling_params", None)
        asked = getattr(params, "extra_args", None) or {}
        is_asked = bool(asked.get(RECEIPT_ARG) or PRECISION_ARG in asked)
        if not is_asked and self.span_text is None:
            return
        precision = asked.get(PRECISION_ARG)
        draft = _Draft(request, precision == FULL, asked.get(RECEIPT_ARG) == TOKENS, is_asked)
        if draft.demands_full:
            self._provenance.demand_full_precision(request.request_id)
        elif precision is not None:
            draft.error = f"{PRECISION_ARG} is {precision!r:.80}, known is {FULL!r}; leave it out for the server's rule"
            level = logging.DEBUG if self._has_warned else logging.WARNING  # clients may send as many as they like
            logger.log(level, "morphserve: request %.80r: %s", request.request_id, draft.error)
            self._has_warned = True
        self._drafts[request.request_id] = draft

    def on_turn(self, request: Request) -> None:
        """Look at what a session asks for from now on; its answer also depends on what it computed before."""
        before = self._drafts.pop(request.request_id, None)
        self.on_arrival(request)
        if (draft := self._drafts.get(request.request_id)) is None:
            return
        draft.is_continued = True
        if before is not None:
            draft.num_preemptions, draft.reused, draft.computed = before.num_preemptions, before.reused, before.computed
            draft.num_computed_tokens = request.num_computed_tokens
            self._begun[request.request_id] = draft

    def on_scheduled(self, num_scheduled_tokens: dict[str, int], level: int, started: Iterable[str]) -> None:
        """Take in a step at `level`.

        Args:
            num_scheduled_tokens: by request, which vLLM has counted as computed already.
            level: it will run at.
            started: requests that begin in it, or begin again after a preemption.
        """
        if level != self._level:
            for request_id, draft in self._begun.items():
                draft.count_computed(self._level, num_scheduled_tokens.get(request_id, 0))
            self._level = level
        if self._drafts:
            for request_id in started:
                if (draft := self._drafts.get(request_id)) is not None:
                    self._begin(draft, num_scheduled_tokens.get(request_id, 0))

    def before_outputs(self, level: int) -> None:
        """Take in that the tokens of a step at `level` are about to reach their requests."""
        if level != self._level_of_outputs:
            for draft in self._begun.values():
                draft.count_output(self._level_of_outputs)
            self._level_of_outputs = level

    def before_preemption(self, request: Request) -> None:
        """Take in that a request is about to lose what it has computed; a token under way may yet be its last."""
        if (draft := self._begun.get(request.request_id)) is not None:
            draft.count_computed(self._level)

    def on_finish(self, request: Request) -> None:
        """Close a request's receipt; its blocks are still there."""
        draft = self._drafts.pop(request.request_id, None)
        if draft is not None:
            self._seal(draft)

    def on_turn_end(self, request: Request) -> None:
        """Close the receipt of a session's turn; the next turn's begins with the same context."""
        draft = self._drafts.get(request.request_id)
        if draft is not None:
            self._seal(draft)

    def forget(self, request_id: str) -> None:
        """Forget a session that ends between two turns. Unknown ids are fine."""
        self._drafts.pop(request_id, None)
        self._begun.pop(request_id, None)

    def _seal(self, draft: _Draft) -> None:
        request = draft.request
        if self._begun.pop(request.request_id, None) is not None:
            draft.count_computed(self._level)
            draft.count_output(self._level_of_outputs)
        deepest = max((*draft.reused, *draft.computed, *draft.output), default=0)
        if self.span_text is not None:
            self._traced[request.request_id] = self.span_text(draft.output, deepest)
        if not draft.is_asked:
            return
        self._sealed[request.request_id] = {
            "demanded": FULL if draft.demands_full else "any",
            "reuse_rule": self._provenance.rule,
            "reused_tokens": _by_level(draft.reused),
            "computed_tokens": _by_level(draft.computed),
            "output_tokens": _by_level(draft.output),
            "deepest_level": deepest,
            "full_precision": deepest == 0,
            **({"token_levels": draft.runs} if draft.tells_tokens else {}),
            **({"error": draft.error} if draft.error else {}),
        }

    def attach(self, outputs: Iterable[Any]) -> None:
        """Put the receipts of requests that have just ended into their last outputs (`EngineCoreOutput`s)."""
        if not self._sealed and not self._traced:
            return
        for output in outputs:
            if output.finish_reason is None:
                continue
            if (receipt := self._sealed.get(output.request_id)) is not None:
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), "morphserve": receipt}
            if (levels := self._traced.get(output.request_id)) is not None:
                output.trace_headers = spans.with_levels(output.trace_headers, levels)
        self._sealed.clear()  # what was aborted has nobody to tell
        self._traced.clear()

    def _begin(self, draft: _Draft, count: int) -> None:
        request = draft.request
        if draft.num_preemptions == request.num_preemptions:
            return
        draft.num_preemptions = request.num_preemptions
        draft.num_computed_tokens = request.num_computed_tokens - count
        draft.computed.clear()
        draft.reused = self._reused(draft)
        self._begun[request.request_id] = draft

    def _reused(self, draft: _Draft) -> dict[int, int]:
        """Return, by level, the tokens from the prefix cache, or from turns before that nobody had asked about."""
        name = draft.request.request_id
        found = {level: blocks * self._block_size for level, blocks in self._provenance.reused(name).items()}
        if rest := draft.num_computed_tokens - sum(found.values()):
            level = self._provenance.span(name).deepest if draft.is_continued else 0
            found[level] = found.get(level, 0) + rest
        return found


def _by_level(counts: dict[int, int]) -> dict[str, int]:
    return {str(level): counts[level] for level in sorted(counts)}
