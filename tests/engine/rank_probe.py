"""What a test lets the workers of an engine do, through `collective_rpc`: each gets the worker first.

A module of its own, because a worker imports it: functions travel by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kv_resize import MapError
from morphserve.integration.worker import worker as worker_module
from morphserve.integration.worker.state import rank as this_rank
from morphserve.residence import RankTransition

_PLANTED = pytest.MonkeyPatch()
_EVENTS: list[tuple[str, int]] = []


def store_of() -> Any:
    """This rank's variants."""
    return this_rank().layers._parts.store


def stored_files(worker: Any) -> dict[str, tuple[int, int]]:
    """Path of every file of this rank's variants |-> (size, time of writing)."""
    files = sorted(store_of().directory.iterdir())
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.name.startswith("layer-")}


def variant_file(worker: Any, layer: int, fmt: str) -> str:
    """Where this rank reads a layer from, "" for one of another stage."""
    store = store_of()
    if layer not in this_rank().layers.linears:
        return ""
    return str(store.directory / store.entry(layer, fmt).file)


def compilations(worker: Any) -> tuple[dict[str, Any], ...]:
    """Everything that counts a compilation on this rank, in torch and in vLLM."""
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter

    return dict(counters["stats"]), dict(counters["frames"]), dict(vars(compilation_counter))


def skip(worker: Any, rank: int, target: str) -> None:
    """On one rank, `target` (package.module.Class.method) does nothing any more."""
    if worker.rank == rank:
        _PLANTED.setattr(target, lambda *args, **kwargs: None)


def no_memory(worker: Any, rank: int) -> None:
    """On one rank, the system gives no page to the KV cache any more."""

    def refuse(self: Any, num_blocks: int) -> None:
        raise MapError(num_blocks, self.num_mapped, self.num_mapped, "planted")

    if worker.rank == rank:
        _PLANTED.setattr("kv_resize.ElasticCache.map", refuse)


def fail_switch(worker: Any, rank: int) -> None:
    """On one rank, layers that are prepared are not switched, which cannot be."""

    def refuse() -> None:
        raise OSError("planted")

    if worker.rank == rank:
        _PLANTED.setattr(this_rank().swapper, "commit", refuse)


def read_late(worker: Any, rank: int, num_answers: int) -> None:
    """On one rank, layers are still read when it is asked for them so many times."""
    if worker.rank != rank:
        return
    is_reading, left = RankTransition._is_reading, [num_answers]

    def late(self: Any) -> bool:
        if self._reading is None or not left[0]:
            return is_reading(self)
        left[0] -= 1
        return True

    _PLANTED.setattr(RankTransition, "_is_reading", late)


def half_moved(worker: Any, rank: int) -> None:
    """On one rank, the next tables are rewritten by half: the step that follows reads blocks of other tokens."""
    if worker.rank != rank:
        return
    rewrite = worker_module.RankKV.rewrite_block_tables

    def by_half(self: Any, runner: Any, pairs: Any) -> None:
        rewrite(self, runner, pairs[1::2])
        raise OSError("planted")

    _PLANTED.setattr(worker_module.RankKV, "rewrite_block_tables", by_half)


def swap_alone(worker: Any, rank: int, fmt: str) -> None:
    """One rank changes its layers past the controller."""
    if worker.rank == rank:
        layers = this_rank().layers
        layers.switch(dict.fromkeys(layers.linears, fmt))


def heal(worker: Any) -> None:
    """Take back whatever was planted."""
    _PLANTED.undo()


def record(worker: Any) -> None:
    """From now on, keep the order in which this rank meets steps and plans."""
    _EVENTS.clear()
    execute, answer = worker.model_runner.execute_model, worker_module._answer

    def execute_model(output: Any, *args: Any, **kwargs: Any) -> Any:
        _EVENTS.append(("step", sum(output.num_scheduled_tokens.values())))
        return execute(output, *args, **kwargs)

    def answered(worker: Any, plan: Any, action: Any, final: bool = False) -> Any:
        _EVENTS.append((action.__name__, plan.revision))
        return answer(worker, plan, action, final)

    _PLANTED.setattr(worker.model_runner, "execute_model", execute_model)
    _PLANTED.setattr(worker_module, "_answer", answered)


def recorded(worker: Any) -> list[tuple[str, int]]:
    """("step", tokens) and (command, revision), in order."""
    return list(_EVENTS)


def swap_late(worker: Any, rank: int) -> None:
    """On one rank, layers are switched after the next step instead of before it."""
    if worker.rank != rank:
        return
    execute, swapper = worker.model_runner.execute_model, this_rank().swapper
    commit, due = swapper.commit, []

    def execute_model(output: Any, *args: Any, **kwargs: Any) -> Any:
        result = execute(output, *args, **kwargs)
        while output.num_scheduled_tokens and due:
            due.pop()()
        return result

    _PLANTED.setattr(worker.model_runner, "execute_model", execute_model)
    _PLANTED.setattr(swapper, "commit", lambda: due.append(commit))


def lag(worker: Any, rank: int, seconds: float) -> None:
    """One rank says that it took so long to prepare."""
    if worker.rank != rank:
        return
    answer = worker_module._answer

    def answered(worker: Any, plan: Any, action: Any, final: bool = False) -> Any:
        reply = answer(worker, plan, action, final)
        return replace(reply, elapsed_s=seconds) if action.__name__ == "prepare" else reply

    _PLANTED.setattr(worker_module, "_answer", answered)
