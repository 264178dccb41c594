"""Which quantized bases, adapters and proposers may start: refused before weights are loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from morphserve.config import parse_config
from morphserve.errors import ConfigError
from morphserve.integration.start.checks import (
    _check_features,
    _check_lora,
    _check_model,
    _check_speculation,
    policy_setup,
)
from policies import EngineLimits

PLAIN: dict[str, Any] = dict.fromkeys(
    ("is_hybrid", "is_attention_free", "is_moe", "use_mla", "is_encoder_decoder", "is_multimodal_model"), False
)


def check_model(**changes: Any) -> None:
    model = SimpleNamespace(**(PLAIN | {"model": "a-model", "runner_type": "generate", "quantization": None} | changes))
    _check_model(SimpleNamespace(model_config=model))


@pytest.mark.parametrize("quantization", [None, "compressed-tensors"])
def test_bases_that_can_be_rebuilt_may_start(quantization: str | None) -> None:
    """Guards: the refusals below refuse everything."""
    check_model(quantization=quantization)


@pytest.mark.parametrize("quantization", ["gptq", "gptq_marlin", "auto_gptq", "awq", "cpu_awq", "fp8", "bitsandbytes"])
def test_a_base_in_another_quantization_is_refused(quantization: str) -> None:
    """Guards: a base whose packed weights nobody can take apart reaches a worker."""
    with pytest.raises(ConfigError, match=f"quantization '{quantization}'.*int8 or float8.*a step of its ladder"):
        check_model(quantization=quantization)


@pytest.mark.parametrize("field", PLAIN)
def test_each_kind_of_model_is_refused_by_itself(field: str) -> None:
    """Guards: a kind of model that only another refusal happened to catch."""
    with pytest.raises(ConfigError, match="a-model: .* Start without --plugin morphserve"):
        check_model(**{field: True})


def test_models_that_do_not_decode_are_refused() -> None:
    """Guards: a pooling model, which holds no KV between steps."""
    with pytest.raises(ConfigError, match="runner 'pooling'"):
        check_model(runner_type="pooling")


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "medusa", "mtp", "suffix", "ngram_gpu"])
def test_proposers_with_weights_are_refused(method: str) -> None:
    """Guards: a draft model whose KV blocks are moved from under it."""
    with pytest.raises(ConfigError, match=f"'{method}'.*supported is ngram. Leave out --speculative-config"):
        _check_speculation(SimpleNamespace(speculative_config=SimpleNamespace(method=method)))


def test_proposals_from_the_text_may_start() -> None:
    """Guards: a refusal of what is tested to work."""
    _check_speculation(SimpleNamespace(speculative_config=None))
    _check_speculation(SimpleNamespace(speculative_config=SimpleNamespace(method="ngram")))


@pytest.mark.parametrize("given", [{"profile": "/some/profile"}, {"variants": {"w4": "/some/checkpoint"}}])
def test_adapters_are_refused_beside_layers_that_change_norms(given: dict[str, Any]) -> None:
    """Guards: an adapter on inputs that a variant's norm has scaled; and the same settings refused without adapters."""
    config = parse_config(given)
    _check_lora(config, SimpleNamespace(lora_config=None))
    _check_lora(parse_config({}), SimpleNamespace(lora_config=object()))
    with pytest.raises(ConfigError, match=f"{next(iter(given))}: .* together with --enable-lora"):
        _check_lora(config, SimpleNamespace(lora_config=object()))


def check_features(
    kv_transfer_config: Any = None,
    enable_sleep_mode: bool = False,
    weight_transfer_config: Any = None,
    enable_fault_tolerance: bool = False,
) -> None:
    parallel = SimpleNamespace(
        distributed_executor_backend="uni", world_size=1, pipeline_parallel_size=1, data_parallel_size=1,
        data_parallel_size_local=1, data_parallel_backend="mp", enable_expert_parallel=False, nnodes=1,
        enable_fault_tolerance=enable_fault_tolerance,
    )  # fmt: skip
    model = SimpleNamespace(enable_sleep_mode=enable_sleep_mode)
    _check_features(
        SimpleNamespace(
            parallel_config=parallel,
            model_config=model,
            kv_transfer_config=kv_transfer_config,
            weight_transfer_config=weight_transfer_config,
        )
    )


def test_what_else_moves_weights_or_kv_is_refused() -> None:
    """Guards: a KV connector that reads blocks while they move, or sleep that frees weights a second time."""
    check_features()
    with pytest.raises(ConfigError, match="Leave out --kv-transfer-config"):
        check_features(kv_transfer_config=object())
    with pytest.raises(ConfigError, match="Leave out --enable-sleep-mode"):
        check_features(enable_sleep_mode=True)
    with pytest.raises(ConfigError, match="Leave out --weight-transfer-config"):
        check_features(weight_transfer_config=object())


def test_an_engine_that_ended_is_not_stepped_again() -> None:
    """Guards: vLLM's fault tolerance, which steps an engine on whose ranks differ, and so has ended."""
    with pytest.raises(ConfigError, match="steps the same engine again.*Leave out --enable-fault-tolerance"):
        check_features(enable_fault_tolerance=True)


@pytest.mark.parametrize(("scheduling", "ahead"), [(True, True), (False, False), (None, False)])
def test_the_policy_is_told_that_steps_are_sent_ahead(scheduling: bool | None, ahead: bool) -> None:
    """Guards: a prompt's time learned as that of the step before it, on every GPU."""
    sizes = {"block_size": 16, "max_num_seqs": 32, "max_num_batched_tokens": 2048, "async_scheduling": scheduling}
    engine: Any = SimpleNamespace(cache_config=SimpleNamespace(**sizes), scheduler_config=SimpleNamespace(**sizes))
    assert policy_setup(parse_config({}), engine).limits == EngineLimits(16, 32, 2048, False, ahead)
