"""ExecutorPort over vLLM's collective rpc.

A command travels in the same first-in-first-out queue as the forward passes, so every rank carries it out
between the same two steps (vllm/v1/executor/multiproc_executor.py). Replies of non-blocking calls are drained
by the next step's own result; at most two are sent per step, far below the ~10 undrained replies that would
dead-lock the shared-memory ring.

A rank that works in the background answers at once that it is pending. It is asked again, once for each answer, until
it is done: a ticket hides that, so the controller sees one command and one answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from morphserve.control import Plan, Reply, Ticket

if TYPE_CHECKING:
    from vllm.v1.executor import Executor

COMMIT = "morphserve_commit"
PAUSE_SAMPLES = 512  # bounded: the status page reports percentiles of the latest


class RpcTicket:
    """Replies of all ranks to one command.

    A rank that has failed is asked again with those that are not done, and then speaks of what it did before: its
    failure stays. A failed commit is told at once, as steps run meanwhile on ranks that differ.
    """

    def __init__(
        self, call: Callable[[str, Plan], Any], method: str, plan: Plan, num_ranks: int, pauses: deque[float]
    ) -> None:
        """Send the command."""
        self._call = call
        self._plan = plan
        self._num_ranks = num_ranks
        self._pauses = pauses
        self._elapsed_s = [0.0] * num_ranks  # that each rank's steps have stood still for this command
        self._pause_s = 0.0  # the longest of these
        self._failed: dict[int, Reply] = {}  # by the rank's place; the first word of each
        self._waits_for_all = method != COMMIT
        self._replies: tuple[Reply, ...] | None = None
        self._future = call(method, plan)

    def poll(self) -> tuple[Reply, ...] | None:
        """Return all replies, or None. A failed transport counts as a failure of every rank."""
        if self._replies is None and self._future.done():
            replies = self._taken()
            self._pause_s = max([self._pause_s, *(r.elapsed_s for r in replies)])
            self._elapsed_s = [a + r.elapsed_s for a, r in zip(self._elapsed_s, replies, strict=True)]
            if any(reply.pending for reply in replies) and (self._waits_for_all or not self._failed):
                self._future = self._call("morphserve_progress", self._plan)
            else:
                self._pauses.append(self._pause_s)
                self._replies = tuple(replace(r, elapsed_s=s) for r, s in zip(replies, self._elapsed_s, strict=True))
        return self._replies

    def _taken(self) -> tuple[Reply, ...]:
        try:
            replies = tuple(self._future.result())
        except Exception as e:  # whatever the transport raised, the controller must hear of it
            error = f"{type(e).__name__}: {e}"
            replies = tuple(
                Reply(rank, self._plan.revision, False, error, kv_moved=False) for rank in range(self._num_ranks)
            )
        for place, reply in enumerate(replies):
            if not reply.ok:
                self._failed.setdefault(place, reply)
        return tuple(self._with_failure(place, reply) for place, reply in enumerate(replies))

    def _with_failure(self, place: int, reply: Reply) -> Reply:
        """Return what a rank says now, and that it has failed, if it has."""
        if (first := self._failed.get(place)) is None:
            return reply
        return replace(reply, ok=False, error=first.error, kv_moved=first.kv_moved and reply.kv_moved)


class RpcExecutor:
    """Sends plans to every rank without waiting."""

    def __init__(self, model_executor: Executor, num_ranks: int, in_background: bool = False) -> None:
        """Send to all ranks. `in_background`: they prepare and give memory back beside forward passes, as on a GPU."""
        self._executor = model_executor
        self._num_ranks = num_ranks
        self.in_background = in_background
        self.pauses: deque[float] = deque(maxlen=PAUSE_SAMPLES)  # seconds, one per answered command

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    def prepare(self, plan: Plan) -> Ticket:
        return self._send("morphserve_prepare", plan)

    def commit(self, plan: Plan) -> Ticket:
        return self._send(COMMIT, plan)

    def abort(self, plan: Plan) -> Ticket:
        return self._send("morphserve_abort", plan)

    def trim(self) -> None:
        """Ask every rank to return free heap to the system. Nobody waits for the answer."""
        self._executor.collective_rpc("morphserve_trim", non_block=True)

    def _send(self, method: str, plan: Plan) -> Ticket:
        return RpcTicket(self._call, method, plan, self._num_ranks, self.pauses)

    def _call(self, method: str, plan: Plan) -> Any:
        return self._executor.collective_rpc(method, args=(plan,), non_block=True)
