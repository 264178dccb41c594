"""What a request's answer depends on, told with the answer: a receipt.

A request asks with vLLM's `vllm_xargs` (offline: `SamplingParams.extra_args`): `morphserve_receipt: 1`, or
`morphserve_precision: "full"`, which also keeps KV that quantized layers wrote out of its context as far as it comes
from the prefix cache. The receipt comes back in the field `kv_transfer_params` of the last output, under "morphserve":
the only field that vLLM hands from the scheduler to the client untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from morphserve.integration.engine.provenance import Provenance

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.morphserve")

RECEIPT_ARG = "morphserve_receipt"
PRECISION_ARG = "morphserve_precision"
FULL = "full"


@dataclass(slots=True)
class _Draft:
    """Counts of a live request. Levels are the effective levels of the steps."""

    request: Any
    demands_full: bool
    error: str = ""
    num_preemptions: int = -1  # at which this life of the request began; -1 = it has not begun
    num_output_tokens: int = 0
    is_continued: bool = False  # a session's, that has context from turns before
    reused: dict[int, int] = field(default_factory=dict)  # deepest level |-> tokens taken from the prefix cache
    computed: dict[int, int] = field(default_factory=dict)  # level |-> tokens whose KV was computed
    output: dict[int, int] = field(default_factory=dict)  # level |-> tokens sampled


class Receipts:
    """Of the requests that asked for one; the others cost nothing."""

    def __init__(self, provenance: Provenance, block_size: int) -> None:
        self._provenance = provenance
        self._block_size = block_size
        self._drafts: dict[str, _Draft] = {}
        self._sealed: dict[str, dict[str, Any]] = {}  # ended in the step whose outputs are being made

    def on_arrival(self, request: Request) -> None:
        """Look at what the request asks for."""
        params = getattr(request, "sampling_params", None)
        asked = getattr(params, "extra_args", None)
        if not asked or not (asked.get(RECEIPT_ARG) or PRECISION_ARG in asked):
            return
        precision = asked.get(PRECISION_ARG)
        draft = _Draft(request, precision == FULL)
        if draft.demands_full:
            self._provenance.demand_full_precision(request.request_id)
        elif precision is not None:
            draft.error = f"{PRECISION_ARG} is {precision!r}, known is {FULL!r}; leave it out for the server's rule"
            logger.warning("morphserve: request %s: %s", request.request_id, draft.error)
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

    def on_scheduled(self, num_scheduled_tokens: dict[str, int], level: int) -> None:
        """Count tokens that a step at `level` will compute."""
        for request_id, draft in self._drafts.items():
            count = num_scheduled_tokens.get(request_id, 0)
            if count == 0:
                continue
            if draft.num_preemptions != draft.request.num_preemptions:  # begins, or begins again
                draft.num_preemptions = draft.request.num_preemptions
                draft.computed.clear()
                draft.reused = self._reused(draft.request, count, draft.is_continued)
            draft.computed[level] = draft.computed.get(level, 0) + count

    def on_sampled(self, level: int) -> None:
        """Count outputs of a step at `level` that have reached their requests."""
        for draft in self._drafts.values():
            self._count_output(draft, level)

    def on_finish(self, request: Request, level: int) -> None:
        """Close a request's receipt, in a step at `level` or at an abort; its blocks are still there."""
        draft = self._drafts.pop(request.request_id, None)
        if draft is not None:
            self._seal(draft, level)

    def on_turn_end(self, request: Request, level: int) -> None:
        """Close the receipt of a session's turn, in a step at `level`; the next turn's begins with the same context."""
        draft = self._drafts.get(request.request_id)
        if draft is not None:
            self._seal(draft, level)

    def forget(self, request_id: str) -> None:
        """Forget a session that ends between two turns. Unknown ids are fine."""
        self._drafts.pop(request_id, None)

    def _seal(self, draft: _Draft, level: int) -> None:
        request = draft.request
        self._count_output(draft, level)
        deepest = max((*draft.reused, *draft.computed, *draft.output), default=0)
        self._sealed[request.request_id] = {
            "demanded": FULL if draft.demands_full else "any",
            "reuse_rule": self._provenance.rule,
            "reused_tokens": _by_level(draft.reused),
            "computed_tokens": _by_level(draft.computed),
            "output_tokens": _by_level(draft.output),
            "deepest_level": deepest,
            "full_precision": deepest == 0,
            **({"error": draft.error} if draft.error else {}),
        }

    def attach(self, outputs: Iterable[Any]) -> None:
        """Put the receipts of requests that have just ended into their last outputs (`EngineCoreOutput`s)."""
        if not self._sealed:
            return
        for output in outputs:
            receipt = self._sealed.get(output.request_id) if output.finish_reason is not None else None
            if receipt is not None:
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), "morphserve": receipt}
        self._sealed.clear()  # what was aborted has nobody to tell

    def _reused(self, request: Request, count: int, is_continued: bool) -> dict[int, int]:
        """Tokens taken from the prefix cache, or from turns before that nobody had asked about.

        `count` of those that vLLM calls computed are only scheduled yet.
        """
        found = {
            level: blocks * self._block_size for level, blocks in self._provenance.reused(request.request_id).items()
        }
        if rest := request.num_computed_tokens - count - sum(found.values()):
            level = self._provenance.span(request.request_id).deepest if is_continued else 0
            found[level] = found.get(level, 0) + rest
        return found

    @staticmethod
    def _count_output(draft: _Draft, level: int) -> None:
        if new := draft.request.num_output_tokens - draft.num_output_tokens:
            draft.output[level] = draft.output.get(level, 0) + new
            draft.num_output_tokens += new


def _by_level(counts: dict[int, int]) -> dict[str, int]:
    return {str(level): counts[level] for level in sorted(counts)}
