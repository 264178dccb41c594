"""Refusals that need the finished VllmConfig but neither weights nor workers: fail before they start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphserve.config import MorphServeConfig, check_formats, step_times_file
from morphserve.control import RankBytes, build_ladder, check_floor, ladder_formats
from morphserve.errors import ConfigError
from morphserve.integration.start.device import check_platform, device_type, serving_residence
from morphserve.integration.start.device_checks import check_device, check_graph_buffers
from morphserve.integration.start.places import check_log, with_cache
from morphserve.integration.start.settings import STATED, for_this_device, settings_of
from morphserve.integration.start.sources import check_sources
from morphserve.profile_ladder import read_ladder
from morphserve.user_input import read_tokens
from policies import BASE_FORMAT, EngineLimits, Ladder, Policy, PolicySetup, load_step_times
from quant_layers import FORMATS, split_format

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_BASE_BITS = 16

_PROPOSERS = ("ngram",)


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse what MorphServe cannot serve; leave the settings with a cache directory that can be written.

    Raises:
        ConfigError: value, limit, remedy.
    """
    config = settings_of(vllm_config)
    if config is None:
        return
    check_platform(vllm_config.parallel_config.world_size_across_dp)
    check_formats(config, FORMATS)
    read_tokens(config.admin.token_file, config.admin.read_token_file)  # as the API server, once weights are loaded
    check_log(config.decision_log)
    if not serving_residence().in_pages:  # which keeps nothing there
        config = with_cache(config)
        setattr(vllm_config, STATED, config)
    _check_model(vllm_config)
    _check_features(vllm_config)
    _check_lora(config, vllm_config)
    check_sources(config, vllm_config.model_config, device_type())
    config = for_this_device(config, vllm_config)
    if serving_residence().in_pages:
        check_device(vllm_config)
    _check_speculation(vllm_config)
    check_levels(config, vllm_config)
    if config.kv.base_num_blocks is not None:
        check_floor(
            config.kv.base_num_blocks,
            vllm_config.model_config.max_model_len,
            vllm_config.cache_config.block_size,
        )


def policy_setup(config: MorphServeConfig, vllm_config: VllmConfig) -> PolicySetup:
    """Return what the policy is made of, beside the ladder.

    Raises:
        ConfigError: step times that there are cannot be read. Policies do not know our errors.
    """
    limits = EngineLimits(
        vllm_config.cache_config.block_size,
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.scheduler_config.max_num_batched_tokens,
        serving_residence().in_pages,
        bool(vllm_config.scheduler_config.async_scheduling),
    )
    try:
        file = step_times_file(config)
        times = None if file is None or config.policy.kind != "slo" else load_step_times(file)
    except ValueError as e:
        raise ConfigError(f"policy: {e}") from e
    return PolicySetup(config.policy, times, limits)


def make_policy(setup: PolicySetup, ladder: Ladder) -> Policy:
    """Build the policy that the `policy:` section asks for.

    Raises:
        ConfigError: the section does not fit the ladder.
    """
    try:
        return setup.build(ladder)
    except ValueError as e:
        raise ConfigError(f"policy: {e}") from e


def _check_model(vllm_config: VllmConfig) -> None:
    model = vllm_config.model_config
    remedy = "Start without --plugin morphserve, or serve a dense decoder-only transformer."
    for bad, what in (
        (model.runner_type != "generate", f"runner {model.runner_type!r}: only 'generate' decodes tokens"),
        (model.is_hybrid, "hybrid (Mamba) layers keep state that is not a KV block"),
        (model.is_attention_free, "no attention layers, so no KV cache that could grow"),
        (model.is_moe, "mixture of experts: experts are not ordinary linears and have no variants"),
        (model.use_mla, "multi-head latent attention: its linears are folded into the attention"),
        (model.is_encoder_decoder, "encoder-decoder: cross-attention KV is not resized"),
        (model.is_multimodal_model, "multimodal: the encoder's layers are not in the ladder"),
    ):
        if bad:
            raise ConfigError(f"{model.model}: {what}. {remedy}")
    if model.quantization not in (None, "compressed-tensors"):  # of which worker/base_linear.py takes some
        raise ConfigError(
            f"{model.model}: quantization {model.quantization!r}; level 0 must be bf16 or fp16 weights, or "
            "compressed-tensors int8 or float8. Serve such a checkpoint of this model; one in 4 bits can be a step of "
            "its ladder (`variants: {w4: CHECKPOINT}`)."
        )


def _check_features(vllm_config: VllmConfig) -> None:
    from vllm.config import CompilationMode

    v = vllm_config
    backend = v.parallel_config.distributed_executor_backend
    if backend not in ("mp", "uni") or (backend == "uni" and v.parallel_config.world_size > 1):
        raise ConfigError(
            f"distributed_executor_backend {backend!r} with {v.parallel_config.world_size} ranks: commands must "
            "travel in one queue with the steps, as with 'mp' (any number) and 'uni' (one rank). Use one of them."
        )
    for bad, what, remedy in (
        (v.kv_transfer_config is not None, "a KV connector registers KV memory", "--kv-transfer-config"),
        (
            v.weight_transfer_config is not None,
            "weights that are sent in later would be lost with the first restore",
            "--weight-transfer-config",
        ),
        (
            v.parallel_config.enable_fault_tolerance,
            "after an error it steps the same engine again, also one that has ended because its ranks differ",
            "--enable-fault-tolerance and --fault-tolerance-config",
        ),
        (v.model_config.enable_sleep_mode, "sleep mode frees weights on its own", "--enable-sleep-mode"),
        (
            # Seen with and without MorphServe: vLLM makes the buffer between stages in a warm-up that only a compiled
            # model gets (vllm/v1/worker/cpu_model_runner.py, warming_up_model).
            device_type() == "cpu"
            and v.parallel_config.pipeline_parallel_size > 1
            and v.compilation_config.mode == CompilationMode.NONE,
            "vLLM on CPU cannot run pipeline stages eagerly, its first step fails",
            "--enforce-eager",
        ),
        (
            v.parallel_config.data_parallel_size > 1 and v.parallel_config.data_parallel_backend != "mp",
            f"data parallel backend {v.parallel_config.data_parallel_backend!r} is not proven, 'mp' is",
            "--data-parallel-backend",
        ),
        (v.parallel_config.enable_expert_parallel, "expert parallel", "--enable-expert-parallel"),
        (
            v.parallel_config.nnodes > 1,
            f"ranks on {v.parallel_config.nnodes} hosts are not proven, on 1 they are",
            "--nnodes",
        ),
        (
            v.parallel_config.data_parallel_size_local < v.parallel_config.data_parallel_size,
            f"{v.parallel_config.data_parallel_size} replicas, {v.parallel_config.data_parallel_size_local} of them on "
            "this host, are not proven, all on one are",
            "--data-parallel-size-local, --data-parallel-rank and --data-parallel-start-rank",
        ),
    ):
        if bad:
            raise ConfigError(f"not supported together with MorphServe: {what}. Leave out {remedy}.")


def _check_speculation(vllm_config: VllmConfig) -> None:
    """N-gram proposals come from the text alone; draft models have weights and a KV cache of their own."""
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _PROPOSERS:
        raise ConfigError(
            f"speculative decoding with {speculative.method!r}: draft models keep weights and block tables that "
            f"MorphServe does not follow, supported is {', '.join(_PROPOSERS)}. Leave out --speculative-config."
        )


def _check_lora(config: MorphServeConfig, vllm_config: VllmConfig) -> None:
    """Refuse adapters where a variant scales the input of the linear that they read."""
    if vllm_config.lora_config is None:
        return
    for name, given in (("profile", config.profile), ("variants", config.variants)):
        if given:
            raise ConfigError(
                f"{name}: {given} together with --enable-lora: its layers change norms, and so what adapters read. "
                f"Leave {name} out (layers are then rounded to nearest), or serve without LoRA."
            )


def nominal_ladder(config: MorphServeConfig, vllm_config: VllmConfig) -> Ladder:
    """Return the levels with the formats that they will have, and sizes that only stand for the real ones.

    Raises:
        ConfigError: the section does not fit the model.
    """
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    profile = read_ladder(config)
    formats = dict.fromkeys((BASE_FORMAT, *FORMATS, *ladder_formats(config.ladder, profile)))
    nominal = {fmt: [_nominal_bytes(fmt)] * num_layers for fmt in formats}
    return build_ladder(num_layers, [RankBytes(nominal, 1024)], config.ladder, 64, profile=profile)


def check_levels(config: MorphServeConfig, vllm_config: VllmConfig) -> None:
    """Refuse settings whose levels cannot be.

    Raises:
        ConfigError: they, or those that the policy names, do not exist; or there are too many for the device.
    """
    _check_ladder(config, vllm_config)
    if serving_residence().in_pages:
        check_graph_buffers(vllm_config, [level.layer_formats for level in nominal_ladder(config, vllm_config)])


def _check_ladder(config: MorphServeConfig, vllm_config: VllmConfig) -> None:
    """Walk the ladder with nominal sizes: a bad order or level shows here, not in a worker."""
    make_policy(policy_setup(config, vllm_config), nominal_ladder(config, vllm_config))


def _nominal_bytes(fmt: str) -> int:
    """Return what a layer weighs in a format, a sixth of it in its attention as is usual."""
    attention, mlp = (_bits(half) for half in split_format(fmt))
    return (attention + 5 * mlp) * 1024


def _bits(fmt: str) -> int:
    if fmt == BASE_FORMAT:
        return _BASE_BITS
    if fmt not in FORMATS:  # the settings' own were checked before
        raise ConfigError(
            f"the profile's ladder has format {fmt!r}; known are {', '.join(FORMATS)}. Make it again with "
            "`morphserve profile`."
        )
    return FORMATS[fmt].bits
