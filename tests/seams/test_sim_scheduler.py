"""The scheduler's model against vLLM's own scheduler, which is fed what a model would have sampled."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from cpu.sim_traffic import BLOCK_TOKENS, Told, Traffic, drive, run_model
from seams.async_world import make_config
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

pytestmark = pytest.mark.seams

BLOCK = 4  # as async_world has it
_HASHER = get_request_block_hasher(BLOCK, sha256)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a directory that vLLM takes for a Llama; nobody loads weights."""
    directory = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 50,
        "max_position_embeddings": 256,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return make_config(directory)


class Real:
    """vLLM's scheduler under the same drive as the model."""

    def __init__(self, vllm_config: Any, traffic: Traffic) -> None:
        vllm_config.scheduler_config.max_num_seqs = traffic.max_num_seqs
        vllm_config.scheduler_config.max_num_batched_tokens = traffic.max_tokens
        vllm_config.cache_config.enable_prefix_caching = traffic.hash_ids is not None
        vllm_config.cache_config.num_gpu_blocks = traffic.num_blocks
        vllm_config.model_config.max_model_len = 200
        import torch

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        kind = AsyncScheduler if traffic.depth > 1 else Scheduler
        self.scheduler: Any = kind(
            vllm_config,
            kv_cache_config=KVCacheConfig(traffic.num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        self.traffic = traffic

    def request(self, index: int) -> Request:
        """Equal hash ids stand for equal text, of which the last one goes on; all else is the request's own."""
        _, prompt, output = self.traffic.requests[index]
        ids = self.traffic.hash_ids[index] if self.traffic.hash_ids else ()
        tokens = [-self._own(index, at) for at in range(prompt)]
        for at in range(prompt if ids else 0):
            place = min(at // BLOCK_TOKENS, len(ids) - 1)
            tokens[at] = (1 + ids[place]) * 1000 + at - place * BLOCK_TOKENS
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        params.update_from_generation_config({}, 0)
        return Request(str(index), tokens, params, None, block_hasher=_HASHER)

    def plan(self) -> tuple[Any, Told]:
        scheduler = self.scheduler
        before = {request.request_id for request in scheduler.running}
        output = scheduler.schedule()
        requests = [scheduler.requests[name] for name in output.num_scheduled_tokens]
        pool = scheduler.kv_cache_manager.block_pool
        # After planning, what a step computes is counted as computed.
        makes = [r.request_id for r in requests if not r.is_prefill_chunk]
        told = Told(
            [int(name) for name in output.num_scheduled_tokens if name not in before],
            [int(name) for name in self._preempted(before)],
            len(requests),
            output.total_num_scheduled_tokens,
            sum(r.num_computed_tokens for r in requests),
            len(makes),
            pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        )
        return (output, makes), told

    def end(self, step: Any) -> list[int]:
        output, makes = step
        names = list(output.num_scheduled_tokens)
        sampled = [[-self._own(int(name), 500)] if name in makes else [] for name in names]
        answer = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
        )
        made = self.scheduler.update_from_output(output, answer)
        return [int(one.request_id) for outs in made.values() for one in outs.outputs if one.finish_reason is not None]

    def _preempted(self, before: set[str]) -> list[str]:
        """The newest first: each was put before those preempted ahead of it."""
        names = [request.request_id for request in self.scheduler.waiting if request.request_id in before]
        return names[::-1]

    def _own(self, index: int, at: int) -> int:
        return 1 + index * 1000 + at


def traffic_of(seed: int, depth: int, caching: bool) -> Traffic:
    rng = random.Random(seed)
    requests = sorted((rng.randrange(40), rng.randint(1, 60), rng.randint(1, 50)) for _ in range(30))
    longest = max(prompt + output for _, prompt, output in requests)
    seqs = rng.randint(2, 8)
    return Traffic(
        tuple(requests),
        num_blocks=-(-longest // BLOCK) + 1 + rng.randrange(20),
        block_size=BLOCK,
        max_num_seqs=seqs,
        max_tokens=seqs + rng.randrange(60),
        depth=depth,
        hash_ids=tuple(tuple(rng.choices(range(3), k=rng.randrange(6))) for _ in requests) if caching else None,
    )


@pytest.mark.parametrize(("depth", "caching"), [(1, False), (2, False), (1, True), (2, True)])
def test_same_steps_as_vllm(vllm_config: Any, depth: int, caching: bool) -> None:
    """Guards: a rule of vLLM's scheduler that the model does not have, or has no longer."""
    num_preempted = num_steps = 0
    for seed in range(25):
        traffic = traffic_of(seed, depth, caching)
        real = Real(vllm_config, traffic)
        requests = [real.request(i) for i in range(len(traffic.requests))]
        story = drive(
            traffic, requests, real.scheduler.add_request, real.plan, real.end, real.scheduler.has_unfinished_requests
        )
        model = run_model(traffic)
        for step, (ours, theirs) in enumerate(zip(model, story, strict=False)):
            assert ours == theirs, f"seed {seed}, step {step}"
        assert len(model) == len(story)
        num_steps += len(story)
        num_preempted += sum(len(told.preempted) for told in story)
    assert num_steps > 1000 and num_preempted > 100, (num_steps, num_preempted)
