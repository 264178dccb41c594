"""Which engines of several ranks and replicas may start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationMode

from morphserve.errors import ConfigError
from morphserve.integration.start.checks import _check_features

pytestmark = pytest.mark.seams


def engine(mode: CompilationMode = CompilationMode.DYNAMO_TRACE_ONCE, **parallel: Any) -> SimpleNamespace:
    """As far as the check looks at a VllmConfig."""
    fields = {
        "distributed_executor_backend": "mp",
        "world_size": 1,
        "data_parallel_size": 1,
        "data_parallel_size_local": parallel.get("data_parallel_size", 1),
        "data_parallel_backend": "mp",
        "pipeline_parallel_size": 1,
        "enable_expert_parallel": False,
        "nnodes": 1,
        "enable_fault_tolerance": False,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**(fields | parallel)),
        compilation_config=SimpleNamespace(mode=mode),
        model_config=SimpleNamespace(enable_sleep_mode=False),
        kv_transfer_config=None,
        weight_transfer_config=None,
        lora_config=None,
        speculative_config=None,
    )


@pytest.mark.parametrize(
    "allowed",
    [
        engine(),
        engine(pipeline_parallel_size=2, world_size=2),
        engine(CompilationMode.NONE, data_parallel_size=2),
        engine(world_size=4, pipeline_parallel_size=2, data_parallel_size=2),
    ],
)
def test_stages_and_replicas_may_start(allowed: SimpleNamespace) -> None:
    """Guards: a refusal that has outlived its reason."""
    _check_features(allowed)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            engine(CompilationMode.NONE, pipeline_parallel_size=2, world_size=2),
            "cannot run pipeline stages eagerly.*Leave out --enforce-eager",
        ),
        (engine(data_parallel_size=2, data_parallel_backend="ray"), "'ray'.*--data-parallel-backend"),
        (engine(distributed_executor_backend="ray", world_size=2), "'ray' with 2 ranks"),
        (engine(enable_expert_parallel=True), "expert parallel"),
        (engine(nnodes=2, world_size=4), "ranks on 2 hosts are not proven, on 1 they are. Leave out --nnodes"),
        (engine(distributed_executor_backend="uni", world_size=2), "'uni' with 2 ranks"),
        (engine(data_parallel_size=4, data_parallel_size_local=2), "4 replicas, 2 of them .*-size-local"),
    ],
)
def test_what_cannot_work_is_refused_at_start(refused: SimpleNamespace, words: str) -> None:
    """Guards: an engine that dies at its first request, or whose commands do not keep their place among the steps."""
    with pytest.raises(ConfigError, match=words):
        _check_features(refused)
