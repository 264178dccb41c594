"""ExecutorPort over vLLM's collective rpc.

A command travels in the same first-in-first-out queue as the forward passes, so every rank carries it out
between the same two steps (vllm/v1/executor/multiproc_executor.py). Replies of non-blocking calls are drained
by the next step's own result; at most two are sent per step, far below the ~10 undrained replies that would
dead-lock the shared-memory ring.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from morphserve.controller.ports import Plan, Reply, Ticket

PAUSE_SAMPLES = 512  # bounded: the status page reports percentiles of the latest


class RpcTicket:
    """Replies of all ranks to one command."""

    def __init__(self, future: Any, revision: int, num_ranks: int, pauses: deque[float]) -> None:
        self._future = future
        self._revision = revision
        self._num_ranks = num_ranks
        self._pauses = pauses
        self._replies: tuple[Reply, ...] | None = None

    def poll(self) -> tuple[Reply, ...] | None:
        """All replies, or None. A failed transport counts as a failure of every rank."""
        if self._replies is None and self._future.done():
            try:
                self._replies = tuple(self._future.result())
            except Exception as e:  # whatever the transport raised, the controller must hear of it
                self._replies = tuple(
                    Reply(rank, self._revision, False, f"{type(e).__name__}: {e}", kv_moved=False)
                    for rank in range(self._num_ranks)
                )
            self._pauses.append(max((r.elapsed_s for r in self._replies), default=0.0))
        return self._replies


class RpcExecutor:
    """Sends plans to every rank without waiting."""

    def __init__(self, model_executor: Any, num_ranks: int) -> None:
        self._executor = model_executor
        self._num_ranks = num_ranks
        self.pauses: deque[float] = deque(maxlen=PAUSE_SAMPLES)  # seconds, one per answered command

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    def prepare(self, plan: Plan) -> Ticket:
        return self._send("morphserve_prepare", plan)

    def commit(self, plan: Plan) -> Ticket:
        return self._send("morphserve_commit", plan)

    def abort(self, plan: Plan) -> Ticket:
        return self._send("morphserve_abort", plan)

    def apply(self, plan: Plan) -> Ticket:
        return self._send("morphserve_apply", plan)

    def trim(self) -> None:
        """Ask every rank to return free heap to the system. Nobody waits for the answer."""
        self._executor.collective_rpc("morphserve_trim", non_block=True)

    def _send(self, method: str, plan: Plan) -> Ticket:
        future = self._executor.collective_rpc(method, args=(plan,), non_block=True)
        return RpcTicket(future, plan.revision, self._num_ranks, self.pauses)
