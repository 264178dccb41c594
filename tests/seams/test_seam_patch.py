"""What we patch of vLLM, on classes, modules and single objects, is listed, and goes again without a trace."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from seams.pool_harness import KVModel
from vllm.config import SchedulerConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine.core import EngineCore

from morphserve.integration import seams
from morphserve.integration.seams import SEAMS
from morphserve.integration.worker.refusals import _TARGETS

ALLOCATE = "vllm.v1.worker.gpu_model_runner:allocate_kv_cache"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Nothing is patched but by the test, and what was is patched again after it."""
    before = seams.patches()
    seams.undo()
    yield
    seams.undo()
    for patch in before:
        seams.put(patch.row, patch.name, patch.ours, patch.owner)


def teller(calls: list[str], name: str) -> Callable[[Any], Any]:
    """A maker of wrappers that say their name and call the original."""

    def make(original: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        return wrapper

    return make


def limits(own: int | None) -> Any:
    return SchedulerConfig.default_factory(max_model_len=512, is_encoder_decoder=False, max_num_queued_tokens=own)


def test_two_kinds_of_engine_wrap_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the worker that came second in a process is deaf, or one that is loaded again acts twice."""
    calls: list[str] = []
    owner, name, _ = seams.resolve(ALLOCATE)
    monkeypatch.setattr(owner, name, lambda: calls.append("vllm"))
    host, device = teller(calls, "host"), teller(calls, "device")
    for make in (host, device, host, device):
        seams.wrap(seams.KV_ALLOC, make)
    getattr(owner, name)()
    assert calls == ["device", "host", "vllm"]
    for patch in reversed(seams.patches()[-2:]):
        patch.undo()
    del calls[:]
    getattr(owner, name)()
    assert calls == ["vllm"]


def test_everything_is_undone() -> None:
    """Guards: a vLLM that a test, a script or a host keeps patched: a class, a method that a subclass inherits, what
    was added to a class, a module, one object's method or value, one that was wrapped twice."""
    kv, config = KVModel(), limits(350)
    seams.undo()
    found = {owner: dict(vars(owner)) for owner in (EngineCore, BlockPool, KVCacheManager)}
    of_pool, module = dict(vars(kv.pool)), seams.resolve(ALLOCATE)[0]
    of_module = dict(vars(module))
    calls: list[str] = []
    wrap: Callable[..., Any] = lambda row, name, **where: seams.wrap(row, teller(calls, name), **where)  # noqa: E731
    wrap(seams.ENGINE_HANDLE, "class")
    wrap(seams.POOL_FREE, "all pools")
    wrap(seams.POOL_FREE, "this pool", on=kv.pool)
    wrap(seams.POOL_FREE, "this pool again", on=kv.pool)
    wrap(seams.KV_ALLOC, "module")
    seams.put(seams.ENGINE_UTILITIES, "morphserve_test", len)
    for limit in (100, None, 200):
        seams.put(seams.DOOR_LIMIT, "max_num_queued_tokens", limit, config)
    kv.pool.free_blocks([])
    assert calls == ["this pool again", "this pool", "all pools"]
    assert EngineCore.morphserve_test is len and config.max_num_queued_tokens == 200  # type: ignore[attr-defined]
    assert [(patch.row.name, patch.name) for patch in seams.patches()] == [
        ("engine_handle", "_initialize_kv_caches"), ("engine_utilities", "morphserve_test"),
        ("pool_free", "free_blocks"), ("pool_free", "free_blocks"), ("pool_free", "free_blocks"),
        ("kv_alloc", "allocate_kv_cache"), ("door_limit", "max_num_queued_tokens"),
    ]  # fmt: skip
    seams.undo()
    assert seams.patches() == []
    for owner, names in found.items():
        assert dict(vars(owner)) == names
    assert vars(kv.pool) == of_pool and vars(module) == of_module and config.max_num_queued_tokens == 350
    seams.undo()


def test_a_live_engines_objects_are_listed_and_restored() -> None:
    """Guards: a patch past the table: nobody lists it, and it stays when all are undone."""
    kv = KVModel()
    fresh = (set(vars(BlockPool)), set(vars(KVCacheManager)))
    kv.port.begin_shrink(kv.port.num_kv_blocks - 2)
    ours = {
        (owner, name)
        for owner, known in zip((kv.pool, kv.manager), fresh, strict=True)
        for name in vars(owner)
        if name in known
    }
    assert {name for _, name in ours} == {
        "cache_full_blocks", "cache_partial_block", "get_cached_block", "free_blocks", "get_computed_blocks",
        "allocate_slots",
    }  # fmt: skip
    assert {(patch.owner, patch.name) for patch in seams.patches()} == ours
    assert all(seams.check_seam(patch.row).ok for patch in seams.patches())
    seams.undo()
    assert not any(name in vars(owner) for owner, name in ours)


def test_what_somebody_put_over_ours_stays() -> None:
    """Guards: another plugin's wrapper taken away with ours, or ours put back under a name that is another's."""
    pool, calls = KVModel().pool, []
    seams.undo()
    patch = seams.wrap(seams.POOL_FREE, teller(calls, "ours"), on=pool)
    assert patch is not None
    pool.free_blocks = teller(calls, "theirs")(pool.free_blocks)
    patch.undo()
    pool.free_blocks([])
    assert calls == ["theirs", "ours"] and seams.patches() == []


def test_an_engine_that_is_gone_takes_its_patches_along() -> None:
    """Guards: the list keeps the pools and models of every engine that a process has had."""

    class Config:
        """As vLLM's is: an object that can be referred to weakly."""

        step = max_num_queued_tokens = None

    config = Config()
    seams.put(seams.DOOR_LIMIT, "max_num_queued_tokens", 5, config)
    seams.wrap(seams.DOOR_LIMIT, partial(partial, print), on=config, name="step")
    assert len(seams.patches()) == 2
    del config
    gc.collect()
    assert seams.patches() == []


@pytest.mark.parametrize("method", _TARGETS)
def test_a_method_that_its_row_lists_is_patched(method: str) -> None:
    """Guards: a method that a row lists as one of its class's attributes is patched elsewhere, or not at all."""
    patch = seams.wrap(seams.WORKER_WEIGHTS, teller([], "refused"), name=method)
    assert patch is not None and patch.name == method and patch.row in SEAMS and method in patch.row.attributes
    with pytest.raises(AttributeError, match="no_such_method"):
        seams.wrap(seams.WORKER_WEIGHTS, teller([], "none"), name="no_such_method")
