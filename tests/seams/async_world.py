"""vLLM's real AsyncScheduler under MorphServe's controller, and ranks in miniature that run a step late.

What vLLM's engine does with a batch queue (vllm/v1/engine/core.py, step_with_batch_queue): a step is scheduled and
sent before the answer to the one before it is read. Commands and steps reach every rank in the order of sending.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from morphserve.config import MorphServeConfig
from morphserve.control.ranks import Plan, Reply
from morphserve.integration.describe import RankDescription
from morphserve.integration.engine import wiring as engine
from morphserve.integration.engine.runtime import EngineRuntime
from morphserve.integration.engine.scheduler import make_scheduler
from tests.fakes import ScriptedPolicy

BLOCK = 4  # tokens
MAX_MODEL_LEN = 64
BASE_BLOCKS = 24
BLOCK_BYTES = 100
NUM_LAYERS = 6
LAYERS = {"base": (1000,) * NUM_LAYERS, "w8": (550,) * NUM_LAYERS, "w4": (300,) * NUM_LAYERS}
VOCABULARY = 50
QUEUE = 2  # steps that may be under way, vLLM's figure for async scheduling

init_none_hash(sha256)
_HASHER = get_request_block_hasher(BLOCK, sha256)


def next_token(tokens: list[int]) -> int:
    """Stands for the model: depends on every token before."""
    return hash(tuple(tokens)) % VOCABULARY


@dataclass
class Rank:
    """A model runner: its block tables, what its mapped blocks hold, and which layers it has."""

    index: int
    mapped: int = 0
    formats: list[str] = field(default_factory=lambda: ["base"] * NUM_LAYERS)
    staged: dict[int, str] = field(default_factory=dict)
    tables: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    kv: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, slot) |-> what was computed there
    num_faults: int = 0  # so many of the next commands that move blocks stop half-way
    num_wrong: int = 0  # tokens sampled from KV of another token, which only a rank with faults does
    has_faults: bool = False

    def step(self, output: Any) -> list[tuple[str, list[int]]]:
        """Run one step; what each request sampled."""
        for request_id in output.finished_req_ids:
            self.tables.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            self.tokens[new.req_id] = list(new.prompt_token_ids)
            self.computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                self.tables[request_id] = list(blocks[0])
                self.tokens[request_id] = list(cached.all_token_ids[request_id])
            elif blocks is not None:
                self.tables[request_id] += blocks[0]
            self.computed[request_id] = cached.num_computed_tokens[i]
        return [(r, self._run(r, count)) for r, count in output.num_scheduled_tokens.items()]

    def _run(self, request_id: str, count: int) -> list[int]:
        tokens, table, start = self.tokens[request_id], self.tables[request_id], self.computed[request_id]
        for position in range(start, start + count):
            self._slot(table, position, write=hash(tuple(tokens[: position + 1])))
        is_wrong = False
        for position in range(start + count):
            is_wrong |= self._slot(table, position) != hash(tuple(tokens[: position + 1]))
            assert self.has_faults or not is_wrong, f"{request_id}: KV of another token at {position}"
        if start + count < len(tokens):
            return []  # a part of the prompt
        self.num_wrong += is_wrong
        tokens.append((next_token(tokens) + is_wrong) % VOCABULARY)
        return [tokens[-1]]

    def _slot(self, table: list[int], position: int, write: int | None = None) -> int | None:
        block = table[position // BLOCK]
        assert 0 < block < self.mapped, f"block {block} of a step is not mapped, {self.mapped} are"
        key = block, position % BLOCK
        if write is not None:
            self.kv[key] = write
        return self.kv.get(key)

    def obey(self, method: str, plan: Plan) -> Reply:
        weights = sum(LAYERS[fmt][layer] for layer, fmt in enumerate(self.formats))
        if plan.copies and self.num_faults:
            self.num_faults -= 1
            self.has_faults = True
            self._rename(dict(plan.copies))
            self._move(replace(plan, num_kv_blocks=self.mapped, copies=plan.copies[1::2]))
            figures = {"num_kv_blocks": self.mapped, "weight_bytes": weights}
            return Reply(self.index, plan.revision, False, "half", kv_moved=False, **figures)
        if method == "commit":
            self._move(plan)
        if method == "prepare" or plan.alone:
            self.staged = dict(plan.layer_formats)
        if method == "commit":
            for layer, fmt in self.staged.items():
                self.formats[layer] = fmt
            self.mapped = max(self.mapped, plan.num_kv_blocks)
        if method != "prepare":
            self.staged = {}
        weights = sum(LAYERS[fmt][layer] for layer, fmt in enumerate(self.formats))
        return Reply(self.index, plan.revision, True, num_kv_blocks=self.mapped, weight_bytes=weights)

    def _move(self, plan: Plan) -> None:
        for source, destination in plan.copies:
            for slot in range(BLOCK):
                if (source, slot) in self.kv:
                    self.kv[destination, slot] = self.kv[source, slot]
        self._rename(dict(plan.copies))
        self.mapped = min(self.mapped, plan.num_kv_blocks) if self.mapped else 0
        self.kv = {key: value for key, value in self.kv.items() if key[0] < self.mapped}

    def _rename(self, renamed: dict[int, int]) -> None:
        for table in self.tables.values():
            table[:] = [renamed.get(block, block) for block in table]


class Ranks:
    """vLLM's executor: commands and steps wait in one queue until somebody reads an answer."""

    def __init__(self, num_ranks: int) -> None:
        self.ranks = [Rank(i) for i in range(num_ranks)]
        self.overtake = False  # a fault: commands pass the steps that were sent before them
        self.num_moved_in_flight = 0  # blocks renamed while a step that may use their old names was under way
        self._queue: list[tuple[Any, Callable[[], Any], Future[Any]]] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...] = (), non_block: bool = False) -> Any:
        if method == "morphserve_describe":
            return [RankDescription(rank.index, dict(LAYERS), 100, {}) for rank in self.ranks]
        plan = args[0] if args else None
        if not isinstance(plan, Plan):
            return [0] * len(self.ranks)  # memory of the host, of which there is enough
        if any(output is not None and output.num_scheduled_tokens for output, _, _ in self._queue):
            self.num_moved_in_flight += len(plan.copies)
        name = method.removeprefix("morphserve_")
        future: Future[Any] = Future()
        entry = (None, lambda: [rank.obey(name, plan) for rank in self.ranks], future)
        if self.overtake:
            future.set_result(entry[1]())
        else:
            self._queue.append(entry)
        return future if non_block else self._read(future)

    def execute(self, output: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.append((output, lambda: self._step(output), future))
        return future

    def read(self, future: Future[Any]) -> Any:
        """The answer, and on the way those of all that was sent before."""
        return self._read(future)

    def _read(self, future: Future[Any]) -> Any:
        while not future.done():
            _, run, answer = self._queue.pop(0)
            answer.set_result(run())
        return future.result()

    def _step(self, output: Any) -> ModelRunnerOutput:
        answers = [rank.step(output) for rank in self.ranks]
        assert all(answer == answers[0] for answer in answers) or any(rank.has_faults for rank in self.ranks)
        assert all(rank.formats == self.ranks[0].formats for rank in self.ranks)
        ids = [request_id for request_id, _ in answers[0]]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[tokens for _, tokens in answers[0]],
        )


class World:
    """Scheduler, controller and ranks, driven as vLLM's engine core drives them."""

    def __init__(self, model: Path, num_ranks: int, **settings: Any) -> None:
        self.ranks = Ranks(num_ranks)
        self.policy = ScriptedPolicy()
        self.scheduler: Any = self._start(model, num_ranks, settings)
        self.morph = self.scheduler.morph
        self.morph.controller.replace_policy(self.policy, "a test", self.morph.setup)
        self.tokens: dict[str, list[int]] = {}
        self.expected: dict[str, list[int]] = {}
        self.outputs: list[Any] = []
        self._under_way: list[tuple[Any, Future[Any]]] = []

    def _start(self, model: Path, num_ranks: int, settings: dict[str, Any]) -> Any:
        vllm_config = make_config(model)
        core = SimpleNamespace(model_executor=self.ranks)
        steps = [{"format": fmt, "layers_per_level": 2} for fmt in ("w8", "w4")]
        config = MorphServeConfig.model_validate(
            {
                "ladder": {"steps": steps},
                "transition": {"max_layers_per_step": 2, "max_pause_ms": 1e6},
                "kv": {"migrate_blocks_per_step": 3, "drain_timeout_s": 1e6},
                "policy": {"kind": "static", "level": 0},
                **settings,
            }
        )
        runtime = EngineRuntime(core, vllm_config, config)
        engine._RUNTIMES[id(vllm_config)] = runtime
        kv_config = runtime.plan_kv(kv_cache_configs, [{}] * num_ranks, [])[0]
        vllm_config.cache_config.num_gpu_blocks = kv_config.num_blocks
        return make_scheduler(
            vllm_config,
            kv_cache_config=kv_config,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )

    def add(
        self,
        request_id: str,
        prompt: list[int],
        num_tokens: int,
        session: bool = False,
        arrival_s: float | None = None,
        **asked: Any,
    ) -> None:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, extra_args=asked or None)
        params.update_from_generation_config({}, 0)
        request = Request(
            request_id, list(prompt), params, None, block_hasher=_HASHER, resumable=session, arrival_time=arrival_s
        )
        self.scheduler.add_request(request)
        self.tokens.setdefault(request_id, [])
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(next_token(tokens))
        self.expected[request_id] = tokens[len(prompt) :]

    def end_session(self, request_id: str) -> None:
        """What vLLM's front end sends when a client has sent its last input."""
        params = SamplingParams(max_tokens=1)
        self.scheduler.add_request(Request(request_id, [0], params, None, block_hasher=_HASHER))

    def signals(self) -> Any:
        """What the policy would be asked now."""
        controller, view = self.morph.controller, self.morph.traffic.view()
        pool = self.morph.pool
        return self.morph.monitor.snapshot(
            time.monotonic(), view, pool.num_kv_blocks, pool.num_used_blocks, controller.level, controller.level
        )

    def abort(self, request_id: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        del self.expected[request_id]

    def step(self) -> None:
        """One call of `step_with_batch_queue`."""
        output = self.scheduler.schedule()
        self.check(output)
        self._under_way.append((output, self.ranks.execute(output)))
        if len(self._under_way) < QUEUE and output.num_scheduled_tokens:
            return
        oldest, future = self._under_way.pop(0)
        made = self.scheduler.update_from_output(oldest, self.ranks.read(future))
        for outputs in made.values():
            self.outputs += outputs.outputs
            for one in outputs.outputs:
                self.tokens[one.request_id] += one.new_token_ids
                self.on_output(oldest, one)

    def on_output(self, step: Any, output: Any) -> None:
        """What a step gave one request; for a test to look at."""

    def check(self, output: Any) -> None:
        """No block that some rank has yet to map leaves the scheduler: rule 1."""
        assert not self.morph.controller.failed, self.morph.controller.status()
        assert self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks <= self.morph.pool.num_kv_blocks
        assert isinstance(self.scheduler, AsyncScheduler)

    def run_dry(self, limit: int = 2000) -> None:
        """Until every request has ended; each has the tokens that the model gives it, whatever happened to its KV."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests() and not self._under_way:
                break
            self.step()
            if not self.scheduler.has_unfinished_requests():
                for output, future in self._under_way:
                    self.scheduler.update_from_output(output, self.ranks.read(future))
                self._under_way = []
        for request_id, expected in self.expected.items():
            assert self.tokens[request_id] == expected, request_id


def make_config(model: Path) -> VllmConfig:
    scheduler = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=MAX_MODEL_LEN,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        async_scheduling=True,
    )
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(model), skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN, dtype="bfloat16"
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
        scheduler_config=scheduler,
    )
    # The CPU platform takes both back; what is tested here is the scheduler that other platforms use.
    config.scheduler_config.async_scheduling = True
    config.cache_config.block_size = BLOCK
    return config


def kv_cache_configs(vllm_config: VllmConfig, specs: Any, memory: Any) -> list[KVCacheConfig]:
    """What vLLM would plan: one layer of full attention."""
    num_blocks = vllm_config.cache_config.num_gpu_blocks_override or BASE_BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    tensor = KVCacheTensor(BLOCK_BYTES * num_blocks, ["layer"], layer_stride=0, block_stride=BLOCK_BYTES)
    return [KVCacheConfig(num_blocks, [tensor], [KVCacheGroupSpec(["layer"], spec)]) for _ in specs]
