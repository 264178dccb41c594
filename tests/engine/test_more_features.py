"""Beam search and KV cache events, while the KV cache is resized under them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine.harness import engine, kv_script, morph_of
from engine.rank_harness import CONFIG
from vllm import SamplingParams
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, NullEventPublisher
from vllm.sampling_params import BeamSearchParams
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, maybe_convert_block_hash

BLOCK = 32
NUM_BLOCKS = 146


def tokens_of(seed: int, num: int) -> list[int]:
    """The same for the same seed, whatever the number."""
    source = random.Random(seed)
    return [source.randrange(3, 512) for _ in range(num)]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path, demo_model: Path, variant_cache: Path) -> Iterator[Any]:
    """Beam search wants a tokenizer, whosever. Few tokens a step, so that requests are moved in mid-prompt too."""
    options: dict[str, Any] = {
        "tokenizer": str(demo_model),
        "num_gpu_blocks_override": NUM_BLOCKS,
        "max_num_batched_tokens": 48,
        "kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    }
    with engine(tiny_llama, variant_cache, CONFIG, **options) as started:
        yield started
        assert not morph_of(started).controller.failed


# ---- beam search

WIDTH, NUM_STEPS = 4, 40

BEAM_PROMPTS = [{"prompt_token_ids": tokens_of(0, 2 * BLOCK) + tokens_of(100 + i, 20 + 9 * i)} for i in range(3)]
# A beam's blocks are nobody's between two of its steps: with room for all of them at every size, the same are hit.
BEAM_RESIZES = {step: (90, 60, 120, 56, 75, NUM_BLOCKS)[i % 6] for i, step in enumerate(range(3, 300, 4))}

Beams = list[list[tuple[tuple[int, ...], float]]]


def search(llm: Any) -> Beams:
    """Tokens and score of every sequence, best first. Begins behind blocks that were filled and emptied again."""
    llm.reset_prefix_cache()
    short = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": tokens_of(i, 480)} for i in range(6)], short, use_tqdm=False)
    params = BeamSearchParams(beam_width=WIDTH, max_tokens=NUM_STEPS, ignore_eos=True)
    found = llm.beam_search([dict(prompt) for prompt in BEAM_PROMPTS], params)
    return [[(tuple(beam.tokens), beam.cum_logprob) for beam in one.sequences] for one in found]


def test_beam_search(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: beams that share the blocks of a prefix go on from KV that was left behind in another block."""
    expected = search(llm)
    assert search(llm) == expected, "these runs cannot be compared"
    assert all(len({sequence for sequence, _ in one}) == WIDTH for one in expected)
    moved = count_moves(morph_of(llm).pool, monkeypatch)
    with kv_script(llm, BEAM_RESIZES) as driver:
        assert search(llm) == expected
    print(f"{len(driver.sizes)} sizes, {driver.num_copied} copied: {dict(moved)}")
    assert moved["live"] > 0 and moved["cached"] > 0, moved


def count_moves(pool: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the blocks that are moved: held by a request, by several, found by their hash."""
    counts: Counter[str] = Counter()
    exchange = pool._exchange_ids

    def counted(block: Any, target: Any) -> None:
        counts["live"] += block.ref_cnt > 0
        counts["shared"] += block.ref_cnt > 1
        counts["cached"] += block.block_hash is not None
        exchange(block, target)

    monkeypatch.setattr(pool, "_exchange_ids", counted)
    return counts


# ---- events

_random_sizes = random.Random(5)
TIGHT_RESIZES = {step: _random_sizes.randrange(18, NUM_BLOCKS + 1) for step in range(2, 400, 3)}
NUM_PREFIXES, NUM_ASKED, NUM_AT_ONCE = 12, 60, 8


class Listener(NullEventPublisher):
    """Believes the events and nothing else: how many blocks hold each hash. Compares after every step."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self._pool = pool
        self.blocks: Counter[tuple[Any, Any]] = Counter()  # (group, hash) |-> blocks
        self.num_compared = 0

    def publish(self, batch: Any) -> None:
        for event in batch.events:
            self._take(event)
        self.compare()

    def _take(self, event: Any) -> None:
        if isinstance(event, AllBlocksCleared):
            self.blocks.clear()
            return
        keys = [(event.group_idx, block_hash) for block_hash in event.block_hashes]
        if isinstance(event, BlockStored):
            self.blocks.update(keys)
            return
        assert isinstance(event, BlockRemoved)
        for key in keys:
            assert self.blocks[key] > 0, "removed, and was not announced"
            self.blocks[key] -= 1

    def compare(self) -> None:
        assert +self.blocks == in_pool(self._pool)
        self.num_compared += 1


def in_pool(pool: Any) -> Counter[tuple[Any, Any]]:
    """How many blocks the pool finds by each hash."""
    found: Counter[tuple[Any, Any]] = Counter()
    for key, entry in pool.cached_block_hash_to_block._cache.items():
        name = (get_group_id(key), maybe_convert_block_hash(get_block_hash(key)))
        found[name] += len(entry) if isinstance(entry, dict) else 1
    return found


def ask_conversations(llm: Any) -> int:
    """Prompts that begin alike, some of them the same, always so many at once. Says how many tokens were hit."""
    chosen = random.Random(6)
    outputs: list[Any] = []
    for i in range(NUM_ASKED):
        prefix = tokens_of(chosen.randrange(NUM_PREFIXES), (1 + i % 4) * BLOCK)
        own = tokens_of(1000 + i // 2, 5 + 11 * (i % 7))
        params = SamplingParams(temperature=0.0, max_tokens=4 + 9 * (i % 5), ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request(f"asked-{i}", {"prompt_token_ids": prefix + own}, params)
        while llm.llm_engine.get_num_unfinished_requests() >= NUM_AT_ONCE:
            outputs += llm.llm_engine.step()
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    return sum(output.num_cached_tokens for output in outputs if output.finished)


def count_evictions(pool: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the events of resizing, which may take blocks away and stores none."""
    queue, counts = pool._pool, Counter[str]()

    def counted(call: Any) -> Any:
        def resize(*args: Any) -> Any:
            start = len(queue.kv_event_queue)
            result = call(*args)
            new = queue.kv_event_queue[start:]
            assert all(isinstance(event, BlockRemoved) for event in new), new
            counts[call.__name__] += len(new)
            return result

        return resize

    for name in ("begin_shrink", "advance_shrink", "cancel_shrink", "finish_shrink", "grow"):
        monkeypatch.setattr(pool, name, counted(getattr(pool, name)))
    return counts


def test_kv_cache_events(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a router that follows the events sends requests to blocks that a shrink has given up, or never again
    to those that it has moved."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool, blocks = morph_of(llm).pool, scheduler.kv_cache_manager.block_pool
    llm.reset_prefix_cache()
    blocks.take_events()  # of another test
    listener = Listener(blocks)
    monkeypatch.setattr(scheduler, "kv_event_publisher", listener)
    moved, evicted = count_moves(pool, monkeypatch), count_evictions(pool, monkeypatch)
    with kv_script(llm, TIGHT_RESIZES) as driver:
        num_hit = ask_conversations(llm)
    listener.publish(SimpleNamespace(events=blocks.take_events()))  # of the last resize
    print(f"{len(driver.sizes)} sizes, moved {dict(moved)}, evicted {dict(evicted)}, {num_hit} tokens hit")
    assert evicted["begin_shrink"] > 0 and moved["cached"] > 0 and num_hit > 0
    assert listener.num_compared > 50 and +listener.blocks

    llm.reset_prefix_cache()
    listener.publish(SimpleNamespace(events=blocks.take_events()))
    assert not +listener.blocks
