"""What the engine tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import first_layers
from engine import stock_runs
from engine.rank_harness import CORES, make_model

SHORT_LAYERS = 10


@pytest.fixture(scope="session")
def variant_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed variants of the demo model: built by the first engine, read by the others."""
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="session", autouse=True)
def no_stock_process_left() -> Iterator[None]:
    """The process that `stock` starts serves all modules, and ends with them."""
    yield
    stock_runs.close()


@pytest.fixture(scope="session")
def short_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first `SHORT_LAYERS` layers of the demo model: real weights, a third of the time to compile or profile."""
    return first_layers(demo_model, tmp_path_factory.mktemp("short") / "model", SHORT_LAYERS)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for two ranks."""
    return make_model(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    """A core for each of two ranks, whatever earlier engines of this process were given."""
    from vllm import envs

    with pytest.MonkeyPatch.context() as patch:
        envs.disable_envs_cache()
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, CORES[:2])))
        yield
    envs.disable_envs_cache()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """caplog, also for vLLM's logger, which passes nothing on to the root."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
