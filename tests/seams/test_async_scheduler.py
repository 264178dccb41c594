"""One step under way while levels change: vLLM's AsyncScheduler, which the CPU platform turns off in an engine."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from seams.async_world import NUM_LAYERS, VOCABULARY, World

from morphserve.control.decisions.replay_log import replay
from morphserve.integration.engine.requests.receipts import RECEIPT_ARG

pytestmark = pytest.mark.seams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that vLLM takes for a Llama; nobody loads weights."""
    directory = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def drive(world: World, seed: int, num_steps: int = 250, fault_every: int = 0) -> None:
    """Requests come, end and are aborted, with common prefixes, while the level wanders.

    With `fault_every` rank 0 moves blocks by half, once in so many steps.
    """
    random_ = random.Random(seed)
    common = [random_.randrange(VOCABULARY) for _ in range(10)]
    deepest = len(world.morph.runtime.ladder) - 1
    for step in range(num_steps):
        if fault_every and step % fault_every == 0:
            world.ranks.ranks[0].num_faults = 1
        if random_.random() < 0.25:
            prompt = common[: random_.randrange(11)] + [random_.randrange(VOCABULARY) for _ in range(5)]
            world.add(f"r{step}", prompt, random_.randrange(1, 40))
        if random_.random() < 0.03 and world.scheduler.running:
            world.abort(random_.choice(world.scheduler.running).request_id)
        if random_.random() < 0.08:
            world.policy.level = random_.choice((0, 0, 1, deepest, random_.randrange(deepest + 1)))
        world.step()
    world.ranks.ranks[0].num_faults = 0
    world.run_dry()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_no_block_of_a_step_under_way_is_lost(model: Path, num_ranks: int, seed: int) -> None:
    """Guards rules 1 and 2: a step that was sent before its blocks were renamed, unmapped or handed out again."""
    world = World(model, num_ranks)
    drive(world, seed)
    assert world.ranks.num_moved_in_flight > 0, "no live block was renamed while a step was under way"
    counters = world.morph.controller.counters
    assert counters.transitions.get(("restore", "committed"), 0) > 0 and not counters.errors


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_no_token_comes_of_blocks_that_a_rank_has_moved_by_half(model: Path, num_ranks: int, seed: int) -> None:
    """Guards: tokens of the steps that were under way when copies failed on the rank that samples; requests that are
    lost with them, or that are served from those blocks ever after."""
    again = {"max_layers_per_step": 2, "max_pause_ms": 1e6, "backoff_s": 1e-6, "backoff_max_s": 1e-6}
    world = World(model, num_ranks, transition=again)
    drive(world, seed, fault_every=40)
    assert world.ranks.ranks[0].num_wrong > 0, "no step ran on KV of another token: nothing was to be dropped"
    counters = world.morph.controller.counters
    assert counters.errors.keys() == {"kv_unknown"} and counters.transitions.get(("restore", "committed"), 0) > 0


def test_who_is_sent_back_between_two_steps_goes_on_in_the_next(model: Path) -> None:
    """Guards: a request that a restore or a floor has preempted, and that has room again at once: its rank, which has
    taken it out of its batch, would get no tokens to go on from."""
    world = World(model, 1)
    for name in ("a", "b"):
        world.add(name, [1, 2, 3, 4, 5], 20)
    for _ in range(6):
        world.step()
    assert world.morph.pool.preempt_one() and len(world.scheduler.running) == 1
    world.step()
    assert len(world.scheduler.running) == 2, "it was not resumed at once: nothing was tried"
    world.run_dry()


def test_who_is_sent_back_is_no_lack_of_memory(model: Path) -> None:
    """Guards: a restore whose preemptions the policy takes for a lack of memory, and goes deeper again; or a request
    that is sent back, and waits where nobody counts it."""
    world = World(model, 1)
    for name in ("a", "b"):
        world.add(name, [1, 2, 3, 4, 5], 20)
    for _ in range(6):
        world.step()
    assert world.morph.pool.preempt_one()
    seen = world.signals()
    assert seen.preemptions == 0 and sum(cohort.num_requests for cohort in seen.waiting) == 1
    world.run_dry()


def test_who_is_sent_back_is_told_what_it_had_computed(model: Path) -> None:
    """Guards: a receipt of nothing computed, of a request whose last token was under way when it was sent back."""
    world = World(model, 1)
    for name, token in (("a", 1), ("b", 2)):
        world.add(name, [token] * 5, 20, **{RECEIPT_ARG: 1})
    for _ in range(6):
        world.step()
    had = {name: request.num_computed_tokens for name, request in world.scheduler.requests.items()}
    assert world.morph.pool.preempt_one()
    (gone,) = (name for name, request in world.scheduler.requests.items() if request.num_preemptions)
    assert world.morph.receipts._drafts[gone].computed == {0: had[gone]} and had[gone] > 5
    world.run_dry()


def test_a_command_that_overtakes_a_step_is_seen(model: Path) -> None:
    """Guards the test above: with ranks that carry commands out before the step under way, it must fail."""
    world = World(model, 1)
    world.ranks.overtake = True
    with pytest.raises(AssertionError, match="is not mapped|KV of another token"):
        for seed in range(6):
            drive(world, seed)


@pytest.mark.parametrize("detail", ["changes", "all"])
def test_decisions_of_an_engine_replay(detail: str, model: Path, tmp_path: Path) -> None:
    """Guards: a log that has not what the policy is asked or made of, or is not closed with the engine."""
    path = tmp_path / "decisions.jsonl.gz"
    policy = {"kind": "threshold", "degrade_above": 0.4, "target_usage": 0.3, "restore_below": 0.2}
    world = World(model, 2, policy=policy, decision_log=path, decision_log_detail=detail)
    setup = world.morph.setup
    world.morph.controller.replace_policy(setup.build(world.morph.runtime.ladder), "not the scripted one", setup)
    drive(world, seed=1)
    world.morph.close()
    found = replay(path)
    if detail == "changes":
        assert not found.agrees and "decision_log_detail: changes" in found.problems[0]
    else:
        assert found.agrees and not found.notes and found.compared >= 250, found
        assert len(found.logged_levels) > 1 and found.policies == ["threshold default"] * 2


class CountingWorld(World):
    """Counts, step by step, what receipts are to say; each request asks for one."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.levels: dict[int, int] = {}  # of steps, by the id of their output, which is kept
        self.kept: list[Any] = []
        self.lives: dict[str, int] = {}
        self.computed: dict[str, Counter[str]] = {}
        self.sampled: dict[str, list[int]] = {}
        self.num_receipts = 0
        super().__init__(model, 1, **settings)

    def add(self, request_id: str, prompt: list[int], num_tokens: int, **asked: Any) -> None:
        super().add(request_id, prompt, num_tokens, morphserve_receipt="tokens", **asked)

    def check(self, output: Any) -> None:
        super().check(output)
        level = self.morph.controller.effective_level
        self.kept.append(output)
        self.levels[id(output)] = level
        for name, count in output.num_scheduled_tokens.items():
            life = self.scheduler.requests[name].num_preemptions
            if self.lives.get(name) != life:
                self.lives[name], self.computed[name] = life, Counter()
            self.computed[name][str(level)] += count

    def on_output(self, step: Any, output: Any) -> None:
        levels = self.sampled.setdefault(output.request_id, [])
        levels += [self.levels[id(step)]] * len(output.new_token_ids)
        if output.finish_reason is not None:
            receipt = output.kv_transfer_params["morphserve"]
            told = [level for level, count in receipt["token_levels"] for _ in range(count)]
            assert told == levels
            assert receipt["output_tokens"] == {str(n): levels.count(n) for n in sorted(set(levels))}
            assert receipt["computed_tokens"] == dict(self.computed[output.request_id])
            self.num_receipts += 1


@pytest.mark.parametrize("seed", range(4))
def test_receipts_count_each_token_at_the_level_of_its_step(model: Path, seed: int) -> None:
    """Guards: tokens of a step that was under way when the level changed, or of a preempted life, counted elsewhere."""
    world = CountingWorld(model, kv={"max_preemptions": 2, "migrate_blocks_per_step": 3, "drain_timeout_s": 1e6})
    drive(world, seed, 200)
    assert world.num_receipts > 20 and len({*world.levels.values()}) > 2


def test_blocks_of_a_burst_leave_the_prefix_cache(model: Path) -> None:
    """Guards: what quantized layers wrote keeps its room in the cache after a burst, though nobody may reuse it."""
    world = World(model, 1)
    world.policy.level = 2
    for _ in range(20):
        world.step()
    world.add("r", [1, 2, 3, 4, 5, 6, 7, 8, 9], 8)
    world.run_dry()
    assert world.morph.provenance._written
    world.policy.level = 0
    for _ in range(40):
        world.step()
    assert world.morph.controller.level == 0 and not world.morph.provenance._written


def test_an_error_in_the_books_of_the_prefix_cache_is_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server that reuses no prefix any more, and whose operators see nothing of it."""
    world = World(model, 1)
    monkeypatch.setattr(world.morph.provenance, "_set_level", lambda level: 1 // 0)
    world.policy.level = 1
    for _ in range(20):
        world.step()
    assert world.morph.status()["errors"] == {"provenance": 1}
