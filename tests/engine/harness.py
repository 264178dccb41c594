"""A real vLLM engine in this process, whose morph levels follow a script instead of the load.

Engine core and worker run in this process so that a test can reach both. Everything but the policy is what a
server runs.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine.forked import fork_ranks
from engine.stock_runs import stock as stock
from engine.stock_runs import stock_later as stock_later

from morphserve.control import Health
from morphserve.control.ranks import Plan
from morphserve.cpu_tier import best_dtype
from policies.types import Decision, Signals

PROMPTS = (
    "The history of the city begins with a small settlement on the river, where",
    "In physics, the conservation of energy states that",
    "List three reasons why people learn a second language:",
    "The committee met on Tuesday to discuss the budget for the new library, and",
    "Once upon a time there was a fisherman who",
    "To bake bread at home you need flour, water, salt and",
    "The most common cause of failure in distributed systems is",
    "She opened the letter, read the first line twice, and",
)


# What runs here of 8 and 4 bits on all layers, front to back; nobody has measured what they cost the models of tests.
DOWN_TO_W4 = {
    "order": "front_to_back",
    "steps": [{"format": fmt, "optional": True} for fmt in ("w8", "w4")],
}
# Half of vLLM's default: at its first start an engine runs passes of so many tokens, to prove what one takes.
BATCH_TOKENS = 2048


class ScriptPolicy:
    """Level by number of the decision: {0: 0, 5: 3} means level 3 from the sixth step on."""

    predictions = None
    max_level = 99

    def __init__(self, script: dict[int, int]) -> None:
        self.script = dict(script)
        self.level = 0
        self.count = 0

    def decide(self, signals: Signals) -> Decision:
        self.level = self.script.get(self.count, self.level)
        self.count += 1
        return Decision(self.level, f"script, decision {self.count}")


@contextmanager
def engine(
    model: Path, cache: Path | None, config: dict[str, Any] | None = None, **overrides: Any
) -> Iterator[Any]:
    """An `LLM`; with `cache` None it is stock vLLM. Shut down at the end, whatever happened."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    _register_kernels_once()
    settings: dict[str, Any] = dict(
        model=str(model),
        dtype=best_dtype(),
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=49,
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=BATCH_TOKENS,
        enable_prefix_caching=True,
        disable_log_stats=True,
    )
    if cache is not None:
        merged = {
            "cache_dir": str(cache),
            "prepared": False,  # levels are those that a test gives, whatever comes with the package
            # Sizes of swap batches must not depend on how fast this machine is today: runs are compared token by token.
            "transition": {"max_layers_per_step": 5, "max_pause_ms": 1e6},
            "kv": {"drain_timeout_s": 600.0},
            "policy": {"kind": "static", "level": 0},
            **({} if config and "profile" in config else {"ladder": DOWN_TO_W4}),
            **(config or {}),
        }
        settings["additional_config"] = {"morphserve": merged}
    settings.update(overrides)
    if settings.get("distributed_executor_backend") == "mp":
        fork_ranks()
    # A start collects garbage again and again, each time through all that torch and vLLM have imported. vLLM freezes
    # all objects, too, but only at the end of a start.
    gc.freeze()
    try:
        llm = LLM(**settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
    finally:
        gc.unfreeze()  # shutdown does so; a start that was refused does not get there


def need_kernel(name: str, dtype: str = "bfloat16") -> None:
    """Skip the test where this kernel does not run, with the kernel's own reason."""
    import torch
    import vllm._custom_ops  # noqa: F401  loads vLLM's operators, the build that fits this CPU

    from quant_layers import probe

    report = probe(getattr(torch, dtype))[name]
    if not report.ok:
        pytest.skip(f"{name}: {report.reason}")


def _register_kernels_once() -> None:
    """At each start vLLM looks for its kernels in every attribute of every module: a second that finds nothing new."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    register = platform.register_triton_kernel_overrides
    if not hasattr(register, "cache_info"):
        platform.register_triton_kernel_overrides = staticmethod(functools.cache(register))


def morph_of(llm: Any) -> Any:
    """The `Morph` of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler.morph


def follow(llm: Any, script: dict[int, int]) -> ScriptPolicy:
    """Let the levels follow `script` from the next step on."""
    return install(llm, ScriptPolicy(script))


def install(llm: Any, policy: ScriptPolicy) -> Any:
    """Ask `policy` from the next step on."""
    morph = morph_of(llm)
    morph.controller.replace_policy(policy, "a test", morph.setup)
    return policy


def generate(
    llm: Any, prompts: tuple[str, ...] = PROMPTS, max_tokens: int = 48, logprobs: int | None = 3
) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Greedy (tokens, logprobs of the chosen tokens) of each prompt, all in flight at once."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)
    found = []
    for output in llm.generate(list(prompts), params, use_tqdm=False):
        completion = output.outputs[0]
        chosen = tuple(
            step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
        )
        found.append((tuple(completion.token_ids), chosen))
    return found


def settle(llm: Any, level: int, limit: int = 400, patience_s: float = 20.0) -> None:
    """Step the idle engine until it stands at `level`.

    `patience_s`: beyond `limit` steps, which pass faster than a back-off, or than ranks that work beside them.
    """
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # idle steps are a loop of nothing else, which leaves other threads no turn
    try:
        _settle(llm, level, limit, patience_s)
    finally:
        sys.setswitchinterval(interval_s)


def _settle(llm: Any, level: int, limit: int, patience_s: float) -> None:
    deadline_s = time.monotonic() + patience_s
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    steps = 0
    while steps < limit or time.monotonic() < deadline_s:
        steps += 1
        status = morph_of(llm).controller.status()
        # Between two swap batches of one level the phase is idle and the level already the shallower one.
        if status["level"] == level and status["phase"] == "idle" and not morph_of(llm).controller.in_transition:
            return
        scheduler.morph.wake_due = True
        llm.llm_engine.engine_core.engine_core.step_fn()
    raise AssertionError(f"level {level} not reached in {steps} steps: {morph_of(llm).controller.status()}")


def renew(llm: Any) -> None:
    """Level 0 and a fresh controller, whatever a fault has left. The engine must be idle."""
    morph = morph_of(llm)
    pool, base = morph.pool, morph.runtime.base_num_blocks
    if pool._limit is not None:  # a shrink is in progress
        pool.cancel_shrink()
    if pool.num_kv_blocks > base:
        morph._scheduler.kv_cache_manager.reset_prefix_cache()  # nothing is worth moving below
        pool.begin_shrink(base)
        pool.advance_shrink(0)
        pool.finish_shrink()
    runner = morph.controller._runner
    layers = tuple((layer, "base") for layer in range(len(runner.layer_state.formats)))
    ticket, end_s = morph.executor.commit(Plan(runner.next_revision(), layers, base, alone=True)), time.monotonic() + 60
    while (replies := ticket.poll()) is None and time.monotonic() < end_s:
        time.sleep(0.01)  # where files are slow to come, a rank goes on in its next command
    assert replies is not None and all(reply.ok for reply in replies), replies
    if pool.num_kv_blocks < base:
        pool.grow(base)
    morph._on_level(0)
    morph.health = Health.RUNNING
    morph.controller = morph._make_controller()
    morph.controller._runner.revision = runner.revision  # the ranks remember it


class KVDriver:
    """Stands in for the controller: resizes the KV cache by a script and leaves the layers alone.

    Uses the real pool and the real rank, so that what it proves holds for them.
    """

    level = target_level = effective_level = level_ahead = 0
    wants_wakeup = in_transition = failed = False
    lost = ""

    def look_back(self) -> None:
        """Nothing fails here."""

    def __init__(self, morph: Any, script: dict[int, int]) -> None:
        self._morph = morph
        self._script = dict(script)
        self._step = 0
        self.num_copied = 0
        self.sizes: list[int] = []

    def tick(self, view: Any) -> None:
        target = self._script.pop(self._step, None)
        self._step += 1
        pool = self._morph.pool
        if target is None or target == pool.num_kv_blocks:
            return
        if target > pool.num_kv_blocks:
            self._commit((), target)
            pool.grow(target)
        else:
            pool.begin_shrink(target)
            progress = pool.advance_shrink(1000)
            self.num_copied += len(progress.copies)
            if progress.num_live_tail:
                pool.cancel_shrink()
                self._commit(progress.copies, pool.num_kv_blocks)
                return
            pool.finish_shrink()
            self._commit(progress.copies, target)
        self.sizes.append(target)

    def _commit(self, copies: tuple[tuple[int, int], ...], num_kv_blocks: int) -> None:
        ticket = self._morph.executor.commit(Plan(0, (), num_kv_blocks, copies))
        ticket._future.result()  # several ranks answer through a queue: wait, and take what came before
        replies = ticket.poll()
        assert replies is not None and all(r.ok for r in replies), replies

    def status(self) -> dict[str, Any]:
        return {}


@contextmanager
def kv_script(llm: Any, script: dict[int, int]) -> Iterator[KVDriver]:
    """While inside, a `KVDriver` takes the controller's place. Ends at the size it began with."""
    morph = morph_of(llm)
    controller, size = morph.controller, morph.pool.num_kv_blocks
    driver = KVDriver(morph, script)
    morph.controller = driver
    try:
        yield driver
    finally:
        driver._script = {driver._step: size}
        driver.tick(None)
        morph.controller = controller


def compilations() -> tuple[Any, ...]:
    """Everything that counts a compilation, in torch and in vLLM."""
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter

    return dict(counters["stats"]), dict(counters["frames"]), dict(vars(compilation_counter))
