"""A vLLM engine in this process, stepped by hand, at a level that one sets: to measure, to check, to smoke-test.

vLLM is imported when an engine starts: until then the variables that it reads can still be set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from morphserve.control import Plan
from morphserve.errors import MorphServeError
from policies import Ladder, PolicySetup, StaticConfig, resolve_level


class LevelEngine:
    """An engine that serves nobody, whose requests, steps and levels are asked for one by one.

    Attributes:
        llm: vLLM's `LLM`.
        engine: its `LLMEngine`.
        core: its `EngineCore`; None where that has a process of its own.
        morph: what the scheduler calls at each step; None without the plugin.
        num_added: requests so far, those of `generate` apart.
    """

    def __init__(
        self, model: str, settings: Mapping[str, Any] | None = None, *, in_process: bool = True, **arguments: Any
    ) -> None:
        """Start at level 0.

        Args:
            model: directory or hub name.
            settings: of MorphServe; without a `policy` in them, levels change on request alone, and what was prepared
                is looked for where they say so. None = what `arguments` say, so stock vLLM where they do not either.
            in_process: the engine core in this process; else levels cannot be set, and nothing but `generate` works.
            arguments: of `vllm.LLM`.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import LLM

        if settings is not None:
            own = {"policy": {"kind": "static", "level": 0}, "prepared": False, **settings}
            arguments["additional_config"] = {"morphserve": own}
        self.llm: Any = LLM(model=model, **arguments)
        self.engine = self.llm.llm_engine
        self.core = getattr(self.engine.engine_core, "engine_core", None)
        self.morph = getattr(getattr(self.core, "scheduler", None), "morph", None)
        self.num_added = 0
        self._names: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ladder(self) -> Ladder:
        """All levels."""
        found: Ladder = self.morph.runtime.ladder
        return found

    @property
    def layer_bytes(self) -> dict[str, list[int]]:
        """Bytes of each layer by format, on the rank that holds most of it."""
        ranks = [rank.layer_bytes for rank in self.morph.runtime.ranks]
        return {fmt: [max(sizes) for sizes in zip(*(rank[fmt] for rank in ranks), strict=True)] for fmt in ranks[0]}

    @property
    def worker(self) -> Any:
        """vLLM's worker; there is one only where the engine has a single rank, in this process."""
        return self.core.model_executor.driver_worker.worker

    # -- levels

    def want(self, level: int | str) -> int:
        """Ask for a level from the next step on, and return its index.

        Args:
            level: an index, 'deepest', '8bit' and the like, or a format: the first level with all layers in it.

        Raises:
            ValueError: there is no such level.
        """
        setup = PolicySetup(StaticConfig(kind="static", level=level))
        self.morph.controller.replace_policy(setup.build(self.ladder), "set by hand", setup)
        return resolve_level(self.ladder, level)

    def set_level(self, level: int | str, patience_s: float = 60.0) -> None:
        """Ask for a level (see `want`), and step until it is reached, beside the requests that there are.

        Raises:
            ValueError: there is no such level.
            MorphServeError: it is not reached in time.
        """
        self.settle(self.want(level), patience_s)

    def settle(self, level: int, patience_s: float = 60.0, pause_s: float = 0.0) -> None:
        """Step until the engine stands at a level that it is on its way to.

        Args:
            level: its index.
            patience_s: before the transition counts as failed.
            pause_s: between two steps; even 0 leaves the threads of a rank their turn.

        Raises:
            MorphServeError: it is not reached in time, or will never be.
        """
        deadline_s = time.monotonic() + patience_s
        while not self.is_at(level):
            if self.morph.controller.failed or time.monotonic() > deadline_s:
                raise MorphServeError(
                    f"level {level} is not reached in {patience_s:.0f} s: the engine is at level "
                    f"{self.morph.controller.level}, errors {self.morph.status()['errors']}. The log above says what "
                    "failed; start again when that is repaired."
                )
            time.sleep(pause_s)
            self.step()

    def is_at(self, level: int) -> bool:
        """Return whether the level is reached, and nothing is under way."""
        controller = self.morph.controller
        return bool(controller.level == level and not controller.in_transition)

    def carry_out(
        self, layers: Mapping[int, str], num_kv_blocks: int, copies: tuple[tuple[int, int], ...] = ()
    ) -> None:
        """Let every rank change layers and KV cache at once, past the controller, which goes on as if nothing had been.

        Args:
            layers: decoder layer id |-> format; the others stay as they are.
            num_kv_blocks: mapped when it is done, null block included.
            copies: (source, destination) ids of blocks that move.

        Raises:
            MorphServeError: it failed; then nothing has changed.
        """
        plan = Plan(0, tuple(layers.items()), num_kv_blocks, copies)  # 0 stands outside of every transition
        # Waited for: what is sent without waiting is answered to the next step, and none may come.
        for command in ("morphserve_prepare", "morphserve_commit") if layers else ("morphserve_commit",):
            replies = self.engine.collective_rpc(command, args=(plan,))
            while any(reply.pending for reply in replies):
                time.sleep(0)  # a rank that works beside its steps is not done yet
                replies = self.engine.collective_rpc("morphserve_progress", args=(plan,))
            if errors := [reply.error for reply in replies if not reply.ok]:
                raise MorphServeError("; ".join(errors))

    def memory(self) -> dict[str, Any]:
        """Return what the first rank holds, in bytes, and the format of each of its layers."""
        found: dict[str, Any] = self.engine.collective_rpc("morphserve_memory")[0]
        return found

    # -- requests and steps

    def add(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Queue a greedy request that ends after `max_tokens` tokens."""
        self.num_added += 1
        self._names.append(str(self.num_added))
        self.engine.add_request(self._names[-1], {"prompt_token_ids": list(prompt)}, greedy(max_tokens))

    @property
    def num_requests(self) -> int:
        """Those that have not ended."""
        return int(self.engine.get_num_unfinished_requests())

    def step(self) -> list[Any]:
        """Make one engine step, without requests too, and return the outputs."""
        if self.engine.has_unfinished_requests():
            return list(self.engine.step())
        self.morph.wake_due = True  # an idle core steps when the controller has asked for it
        self.core.step_fn()
        return []

    def timed_step(self) -> float:
        """Make one engine step, and return the seconds that it took."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def finish(self) -> int:
        """Step until every request has ended, and return how many have."""
        num_ended = self.num_requests
        while self.engine.has_unfinished_requests():
            self.step()
        self._names.clear()
        return num_ended

    def abort_all(self) -> None:
        """End every request where it is."""
        self.engine.abort_request(self._names)
        self.finish()

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Return the greedy tokens of each prompt; all are in flight at once, and none ends early."""
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(asked, greedy(max_tokens, detokenize=False), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Shut the engine core down."""
        self.engine.engine_core.shutdown()


def greedy(max_tokens: int, **more: Any) -> Any:
    """Return vLLM's sampling parameters of a greedy request that does not end early, with `more` of vLLM's own."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)
