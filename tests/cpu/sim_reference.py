"""vLLM's V1 scheduling rules as plainly as they can be written: loops over every request in every step.

Read off `vllm/v1/core/sched/scheduler.py` 0.32 (`schedule`, `_preempt_request`, `update_from_output`). With
`asynchronous`, a step is planned before the tokens of the one before it are known, as `AsyncScheduler` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    """As vLLM's own, tokens counted only."""

    index: int
    prompt: int
    output: int
    generated: int = 0
    computed: int = 0
    placeholders: int = 0  # tokens under way
    blocks: int = 0
    finished: bool = False


@dataclass
class Step:
    """What one call of `schedule` planned."""

    scheduled: dict[Request, int] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    context: int = 0
    makes: list[Request] = field(default_factory=list)  # who gets a token of it


class ReferenceScheduler:
    """No prefix cache: a block belongs to one request."""

    def __init__(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_tokens: int, asynchronous: bool = False
    ) -> None:
        self.capacity = num_blocks - 1
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_tokens = max_tokens
        self.asynchronous = asynchronous
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    @property
    def free(self) -> int:
        return self.capacity - sum(request.blocks for request in self.running)

    def schedule(self) -> Step:
        step = Step()
        budget = self.max_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            if request.placeholders and request.computed + 2 - request.placeholders >= request.prompt + request.output:
                index += 1  # its last token is under way
                continue
            missing = request.prompt + request.generated + request.placeholders - request.computed
            count = min(missing, budget)
            if not self._allocate(request, count, step):
                break
            step.scheduled[request] = count
            budget -= count
            index += 1
        while not step.preempted and budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            total = request.prompt + request.generated
            if self._blocks(total) > self.free:
                break
            count = min(total, budget)
            self.waiting.pop(0)
            self.running.append(request)
            request.blocks = self._blocks(count)
            step.admitted.append(request)
            step.scheduled[request] = count
            budget -= count
        self._after_schedule(step)
        return step

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _allocate(self, request: Request, count: int, step: Step) -> bool:
        need = self._blocks(request.computed + count)
        while need - request.blocks > max(self.free, 0):
            victim = self.running.pop()
            self._preempt(victim)
            step.preempted.append(victim)
            if victim is request:
                return False
        request.blocks = need
        return True

    def _preempt(self, victim: Request) -> None:
        victim.blocks = victim.computed = 0
        victim.placeholders = 0
        self.waiting.insert(0, victim)

    def _after_schedule(self, step: Step) -> None:
        for request, count in step.scheduled.items():
            request.computed += count
            step.context += request.computed
            if request.computed == request.prompt + request.generated + request.placeholders:
                step.makes.append(request)
                if self.asynchronous:
                    request.placeholders += 1

    def update(self, step: Step) -> list[Request]:
        """The tokens of a step; who has got its last one."""
        ended = []
        for request in step.makes:
            if request.finished:
                continue
            request.generated += 1
            if request.placeholders:
                request.placeholders -= 1
            if request.generated == request.output:
                request.finished = True
                ended.append(request)
                if request in self.running:
                    self.running.remove(request)
                else:  # preempted while that token was under way
                    self.waiting.remove(request)
        return ended
