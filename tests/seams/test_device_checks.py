"""What an engine on a GPU refuses, and what its settings mean there."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from morphserve.config import LadderConfig, LadderStep, MorphServeConfig, parse_config
from morphserve.control.budget import RankBytes
from morphserve.control.ladder import build_ladder
from morphserve.errors import ConfigError
from morphserve.integration.start import checks
from morphserve.integration.start.device_checks import check_device, check_graph_buffers
from morphserve.integration.start.settings import for_this_device, ladder_note
from morphserve.integration.worker.block_tables import rewrite_block_tables
from morphserve.integration.worker.kv import RankKV, geometry_of, granularity_of
from morphserve.integration.worker.layers import RankLayers
from morphserve.profile_ladder import read_ladder
from morphserve.residence import HostResidence, PagedResidence, numbered, residence_of
from morphserve.version import UNPROVEN_CUDA, UNPROVEN_VLLM
from quant_layers import Kernel, KernelError, KernelReport, ProfileLevel, choose, write_profile
from tests.stand_in_ops import stand_in_operators

pytestmark = pytest.mark.seams


def config(**changes: Any) -> SimpleNamespace:
    """The parts of a VllmConfig that are looked at, with vLLM's defaults."""
    from vllm.config import OffloadConfig, ParallelConfig

    values: dict[str, Any] = {
        "parallel_config": ParallelConfig(),
        "offload_config": OffloadConfig(),
        "attention_config": SimpleNamespace(hisparse_config=None),
        "speculative_config": None,
        "lora_config": None,
        "model_config": model(),
        "compilation_config": SimpleNamespace(use_inductor_graph_partition=False),
    }
    return SimpleNamespace(**{**values, **changes})


def model(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"quantization": None, "enable_cumem_allocator": False, **changes})


def offload(**fields: Any) -> Any:
    from vllm.config import OffloadConfig

    return OffloadConfig(**fields)


def test_the_defaults_pass() -> None:
    """Guards: a refusal of everything."""
    check_device(config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offload_config": {"uva": {"cpu_offload_gb": 2}}}, "--cpu-offload-gb"),
        ({"offload_config": {"prefetch": {"offload_group_size": 4}}}, "--offload-group-size"),
        ({"offload_config": {"offload_backend": "uva"}}, "--offload-backend"),
        (
            {
                "parallel_config": SimpleNamespace(
                    decode_context_parallel_size=2, prefill_context_parallel_size=1, use_ubatching=False
                )
            },
            "--decode-context-parallel-size",
        ),
        (
            {
                "parallel_config": SimpleNamespace(
                    decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=True
                )
            },
            "--enable-dbo",
        ),
        ({"compilation_config": SimpleNamespace(use_inductor_graph_partition=True)}, "use_inductor_graph_partition"),
        ({"attention_config": SimpleNamespace(hisparse_config=object())}, "HiSparse"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"model_config": model(quantization="fp8")}, "quantized .fp8."),
        ({"model_config": model(enable_cumem_allocator=True)}, "--enable-cumem-allocator"),
    ],
)
def test_what_moves_weights_or_blocks_behind_our_back_is_refused(changes: dict[str, Any], words: str) -> None:
    """Guards: two owners of the same memory, found out when the first transition has corrupted it."""
    if isinstance(changes.get("offload_config"), dict):
        changes = {"offload_config": offload(**changes["offload_config"])}
    with pytest.raises(ConfigError, match=words):
        check_device(config(**changes))


def test_a_kv_size_kept_from_another_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an edited ladder in the same file, which vLLM's fingerprint does not see, and no room for its graphs."""
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "0")
    check_device(config())
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    with pytest.raises(ConfigError, match="Leave out VLLM_ENABLE_STARTUP_PLAN=1"):
        check_device(config())


# vLLM's default sizes: 51 graphs of mixed batches and, with 256 requests, 35 of decode steps.
SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


def captured(mode: str = "FULL_AND_PIECEWISE", **parallel: Any) -> Any:
    from vllm.config import CUDAGraphMode

    ranks = {
        "tensor_parallel_size": 2, "pipeline_parallel_size": 1, "world_size_across_dp": 2,
        "disable_custom_all_reduce": False,
    }  # fmt: skip
    return config(
        parallel_config=SimpleNamespace(**{**ranks, **parallel}),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode], cudagraph_capture_sizes=SIZES),
        scheduler_config=SimpleNamespace(max_num_seqs=256),
    )


def ladder_of(num_levels: int, num_layers: int = 32) -> list[tuple[str, ...]]:
    return [("w4",) * level + ("base",) * (num_layers - level) for level in range(num_levels)]


def test_as_many_graph_sets_as_the_all_reduce_has_room_for() -> None:
    """Guards: a capture that stops half-way, minutes into the start, with "rank data buffer is overflowed"."""
    check_graph_buffers(captured(), ladder_of(10))
    words = r"11 levels .* each with 86 CUDA graphs, would register 61,490 buffers .* 65,536: at most 10 levels"
    with pytest.raises(ConfigError, match=words):
        check_graph_buffers(captured(), ladder_of(11))


def test_the_start_on_a_gpu_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a refusal that is written and never called."""
    for name in ("check_platform", "check_device", "_check_model", "_check_features", "_check_speculation"):
        monkeypatch.setattr(checks, name, lambda *args: None)
    for name in ("_check_lora", "_check_ladder"):
        monkeypatch.setattr(checks, name, lambda *args: None)
    monkeypatch.setattr("vllm.platforms.current_platform", Platform(90))
    engine = captured()
    engine.model_config = of_layers(32).model_config
    engine.additional_config = {"morphserve": {"ladder": {"steps": [{"format": "w4", "layers_per_level": 1}]}}}
    with pytest.raises(ConfigError, match=r"ladder: 33 levels .* at most 10 levels"):
        checks.check_engine(engine)


@pytest.mark.parametrize(
    "other",
    [
        {"tensor_parallel_size": 1},
        {"disable_custom_all_reduce": True},
        {"mode": "NONE"},
        {"mode": "FULL_DECODE_ONLY"},
        {"pipeline_parallel_size": 2},
    ],
)
def test_what_registers_less_has_room_for_more(other: dict[str, Any]) -> None:
    """Guards: a refusal where nothing is registered, or fewer graphs are, or a stage sees fewer levels."""
    check_graph_buffers(captured(**other), ladder_of(18))


class Platform:
    """vLLM's `current_platform` on an NVIDIA GPU."""

    device_type = "cuda"
    name = "NVIDIA H200"

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    def has_device_capability(self, capability: int) -> bool:
        return self._capability >= capability

    def get_device_name(self) -> str:
        return self.name


def of_layers(num_layers: int, **parallel: Any) -> Any:
    engine = captured(**{"tensor_parallel_size": 1, **parallel})
    engine.model_config = SimpleNamespace(
        get_total_num_hidden_layers=lambda: num_layers, quantization=None, dtype=torch.bfloat16,
    )  # fmt: skip
    return engine


MEASURED = MorphServeConfig(ladder=LadderConfig(expected_kl={"w4": 0.1}))


def test_a_default_ladder_has_room_for_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a large model under tensor parallel that does not start unless somebody writes a ladder for it."""
    monkeypatch.setattr("vllm.platforms.current_platform", Platform(90))
    for num_layers, num_levels, alone in ((32, 9, 4), (80, 3, 2)):
        engine = of_layers(num_layers, tensor_parallel_size=4)
        steps = for_this_device(MEASURED, engine).ladder.steps
        assert isinstance(steps, list)
        assert [step.layers_per_level for step in steps] == [2 * num_layers // (num_levels - 1)] * 2
        check_graph_buffers(engine, ladder_of(num_levels, num_layers))
        (step,) = for_this_device(MorphServeConfig(), engine).ladder.steps or ()
        assert not isinstance(step, str) and step.layers_per_level == num_layers // alone, "of one format"


@pytest.mark.parametrize("value", ["0", "false"])
def test_graphs_must_be_taken_off_the_memory(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Guards: five graph sets captured into memory that the KV cache was given."""
    monkeypatch.setenv("VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", value)
    with pytest.raises(ConfigError, match=f"Leave out VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS={value}"):
        check_device(config())


@pytest.mark.parametrize(
    ("capability", "formats"),
    [(90, ["fp8", "w4"]), (89, ["fp8", "w4"]), (86, ["w8", "w4"]), (75, ["w8", "w4"]), (70, ["w4"])],
)
def test_an_empty_ladder_is_what_the_gpu_multiplies(
    monkeypatch: pytest.MonkeyPatch, capability: int, formats: list[str]
) -> None:
    """Guards: formats that no kernel runs there; a level, and so a set of CUDA graphs, for every other layer; steps
    that a user wrote, lost."""
    monkeypatch.setattr("vllm.platforms.current_platform", Platform(capability))
    for num_layers, levels_of_a_format in ((2, 2), (31, 4), (80, 4)):
        unmeasured = for_this_device(MorphServeConfig(), of_layers(num_layers)).ladder.steps or []
        assert [step.format for step in unmeasured if step != "profile"] == [fmt for fmt in formats if fmt != "w4"]
        steps = for_this_device(MEASURED, of_layers(num_layers)).ladder.steps
        assert isinstance(steps, list) and [step.format for step in steps] == formats
        sizes = {fmt: [size] * num_layers for fmt, size in (("base", 160), ("fp8", 80), ("w8", 80), ("w4", 44))}
        ladder = build_ladder(num_layers, [RankBytes(sizes, 10)], LadderConfig(steps=steps), 20)
        assert len(ladder) == 1 + levels_of_a_format * len(formats)
    written = MorphServeConfig(ladder=LadderConfig(steps=[LadderStep(format="w4")]))
    assert for_this_device(written, of_layers(32)) == written


def test_a_gpu_is_for_who_asks_to_try_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an unproven device in production, because nobody looked, because the switch is off, or because another
    vLLM is to be tried."""
    platform = Platform(90)
    platform.name = "NVIDIA H200 NVL"
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    monkeypatch.setenv(UNPROVEN_VLLM, "1")
    monkeypatch.delenv(UNPROVEN_CUDA, raising=False)
    for off in (None, "", "0"):
        if off is not None:
            monkeypatch.setenv(UNPROVEN_CUDA, off)
        with pytest.raises(ConfigError, match="MORPHSERVE_UNPROVEN_CUDA=1 to try it"):
            checks.check_platform()
    monkeypatch.setenv(UNPROVEN_CUDA, "1")
    checks.check_platform()


@pytest.mark.parametrize(
    ("gpu", "version", "num_ranks", "starts"),
    [
        ("NVIDIA H100 80GB HBM3", "0.33.0", 1, True),
        ("NVIDIA H100 80GB HBM3", "0.33.0", 2, False),
        ("NVIDIA H100 80GB HBM3", "0.32.0", 1, False),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "0.33.0", 1, False),
        ("NVIDIA H100 PCIe", "0.33.0", 1, False),
        ("NVIDIA H200", "0.33.0", 1, True),
        ("NVIDIA H200", "0.33.0", 2, False),
        ("NVIDIA H200 NVL", "0.33.0", 1, False),
        ("NVIDIA H200 MIG 1g.18gb", "0.33.0", 1, False),
        ("NVIDIA A100-SXM4-80GB", "0.33.0", 1, False),
    ],
)
def test_what_was_proven_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    gpu: str, version: str, num_ranks: int, starts: bool,
) -> None:  # fmt: skip
    """Guards: a proven GPU that is refused; one of which nothing is known, or two of them, in its shadow."""
    platform = Platform(90)
    platform.name = gpu
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.delenv(UNPROVEN_CUDA, raising=False)
    if starts:
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
        for of_torch in ("2.11.0+cu130", "2.14.0"):
            monkeypatch.setattr("torch.__version__", of_torch)
            checks.check_platform(num_ranks)
        (record,) = caplog.records
        assert "proven on this GPU with torch 2.11, this is 2.14.0" in record.getMessage()
        return
    words = f"proven on {num_ranks} x {gpu} with vLLM {version}, only on one NVIDIA H100 80GB HBM3 with"
    with pytest.raises(ConfigError, match=re.escape(words)):
        checks.check_platform(num_ranks)


@pytest.mark.parametrize(
    ("base", "formats"),
    [
        ({}, ["w8"]),
        ({"dtype": torch.float32}, ["w8"]),
        ({"dtype": torch.float16}, ["w8"]),
        ({"quantization": "compressed-tensors"}, []),
    ],
)
def test_on_cpu_the_ladder_follows_the_base(base: dict[str, Any], formats: list[str]) -> None:
    """Guards: a ladder for GPUs on a CPU; a default that stops the start of a model of 8 bits; a server that will never
    morph, in silence; W4 of which somebody has said what it costs, left out."""
    engine = of_layers(32)
    vars(engine.model_config).update(base)
    for config, more in ((MorphServeConfig(), []), (MEASURED, ["w4"])):
        steps = for_this_device(config, engine).ladder.steps
        assert isinstance(steps, list)
        assert [(step.format, step.layers_per_level) for step in steps] == [(fmt, 5) for fmt in [*formats, *more]]
        level, note = ladder_note(config, engine)
        assert bool(note) == (not more)
        assert (level == logging.WARNING) == ("level 0 is the only level" in note) == (not formats and not more)


@pytest.mark.parametrize(("cap", "kept", "level"), [(None, 2, logging.INFO), (0.001, 0, logging.WARNING)])
def test_a_profile_that_is_cut_is_told_of(cap: float | None, kept: int, level: int, tmp_path: Path) -> None:
    """Guards: levels that a profile has and the server lacks, without a word; a format packed for nothing."""
    levels = [ProfileLevel({i: "w8" for i in range(n)}, kl, None, n) for n, kl in enumerate((0.0, 0.01, 0.02))]
    levels.append(ProfileLevel({0: "w4", 1: "w4"}, 0.3, None, 3))
    write_profile(tmp_path / "profile", "norms", {}, levels, [0, 1], {}, {})
    config = parse_config({"profile": str(tmp_path / "profile"), "quality": {"max_kl_per_token": cap}})
    assert for_this_device(config, of_layers(2)) == config, "its levels are those of the profile"
    profile = read_ladder(config)
    assert profile is not None and len(profile.levels) == 1 + kept
    found, note = ladder_note(config, of_layers(2))
    assert found == level and f"{3 - kept} levels of the profile are left out" in note and "0.3 nats per token" in note
    assert ("level 0 is the only level" in note) == (not kept)
    whole = config.model_copy(update={"quality": parse_config({"quality": {"max_kl_per_token": 1}}).quality})
    assert ladder_note(whole, of_layers(2)) == (logging.INFO, "")


@pytest.mark.parametrize(("device_type", "name"), [("xpu", "xpu"), ("cuda", "rocm"), ("cpu", "out of tree")])
def test_other_devices_are_refused(device_type: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a start on hardware that nobody has tried, also where its platform borrows the type of another."""
    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: False, device_type=device_type, device_name=name
    )  # fmt: skip
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    with pytest.raises(ConfigError, match=f"'{name}'.*NVIDIA"):
        checks.check_platform()


def test_fake_pages_are_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a CPU server on fake pages, or a GPU without its own."""
    assert residence_of("cuda") is PagedResidence and residence_of("cpu") is HostResidence
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fake_device"))
    fake = residence_of("cpu")
    assert fake is not None and fake.__name__ == "FakePages" and fake.in_pages
    assert residence_of("cuda") is PagedResidence and residence_of("xpu") is None


def test_a_rank_keeps_to_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the pages of every rank on GPU 0, and a thread that cannot choose a device without a number: vLLM says
    "cuda" to each of them (seen with 0.33)."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert numbered(torch.device("cuda")) == torch.device("cuda", 3)
    assert numbered(torch.device("cuda", 1)) == torch.device("cuda", 1)


GPU = SimpleNamespace(in_pages=True, device_type="cuda", loaded=lambda model: None)  # a residence


def kv_config(num_blocks: int, layer_stride: int, block_stride: int, num_layers: int = 4) -> SimpleNamespace:
    tensor = SimpleNamespace(
        layers=[f"layer.{i}" for i in range(num_layers)],
        size=max(layer_stride * num_layers, block_stride * num_blocks),
        layer_stride=layer_stride,
        block_stride=block_stride,
        offset=0,
    )
    return SimpleNamespace(kv_cache_tensors=[tensor], num_blocks=num_blocks, kv_cache_layout="LHBNC")


@pytest.mark.parametrize(
    ("block_bytes", "granularity"), [(64 << 10, 32), (16 << 10, 128), (24 << 10, 256), (2 << 20, 1), (3 << 20, 2)]
)
def test_blocks_come_in_whole_pages(block_bytes: int, granularity: int) -> None:
    """Guards: blocks published that share a page with layers, or a granularity that wastes memory."""
    geometry = geometry_of(kv_config(1024, 1024 * block_bytes, block_bytes), 2 << 20)
    assert granularity_of(geometry) == granularity


def test_a_layout_without_an_end_is_refused() -> None:
    """Guards: heads outside of blocks, where growing would move every address."""
    with pytest.raises(ConfigError, match="KV cache layout LHBNC: .* Set VLLM_KV_CACHE_LAYOUT"):
        geometry_of(kv_config(64, 1000, 500), 4096)


def test_block_tables_on_the_device_are_renamed() -> None:
    """Guards: a step that reads a block where it no longer is, or a row that another step has yet to write."""
    rows = torch.tensor([[5, 9, 0, 0], [7, 2, 3, 0]], dtype=torch.int32)
    address = rows.data_ptr()
    tables = SimpleNamespace(block_tables=[SimpleNamespace(gpu=rows)])
    rewrite_block_tables(SimpleNamespace(block_tables=tables), [(9, 1), (7, 4)], 12)
    assert rows.tolist() == [[5, 1, 0, 0], [4, 2, 3, 0]]
    assert rows.data_ptr() == address, "captured graphs read the old address"


def test_no_table_on_a_device_names_a_block_that_is_gone() -> None:
    """Guards: a kernel that loads a whole row of ids, and meets one whose pages have become a layer's; ids of blocks
    that stay, lost; tables that move under captured graphs."""
    rows = torch.tensor([[5, 9, 0, 0], [7, 2, 11, 12]], dtype=torch.int32)
    inputs = torch.tensor([[10, 3, 9, 8]], dtype=torch.int32)
    kept = rows.data_ptr(), inputs.data_ptr()
    tables = SimpleNamespace(block_tables=[SimpleNamespace(gpu=rows)], input_block_tables=[inputs])
    kv = object.__new__(RankKV)
    kv._cache = SimpleNamespace(num_mapped=13)  # type: ignore[assignment]
    for more in (13, 20):
        kv.forget_blocks(SimpleNamespace(block_tables=tables), more)  # type: ignore[arg-type]
    assert rows.tolist() == [[5, 9, 0, 0], [7, 2, 11, 12]]
    kv.forget_blocks(SimpleNamespace(block_tables=tables), 9)  # type: ignore[arg-type]
    assert rows.tolist() == [[5, 0, 0, 0], [7, 2, 0, 0]] and inputs.tolist() == [[0, 3, 0, 8]]
    assert (rows.data_ptr(), inputs.data_ptr()) == kept
    kv.forget_blocks(SimpleNamespace(), 9)  # type: ignore[arg-type]


def test_block_tables_on_the_host_are_renamed() -> None:
    """Guards: the same in the V1 runner, which has the ids twice."""
    rows = np.array([[5, 9], [7, 2]], dtype=np.int32)
    state = SimpleNamespace(block_ids=([5, 9], [7]))
    tables = SimpleNamespace(block_tables=[SimpleNamespace(block_table=SimpleNamespace(np=rows))])
    runner = SimpleNamespace(requests={"a": state}, input_batch=SimpleNamespace(block_table=tables))
    rewrite_block_tables(runner, [(9, 1), (7, 4)], 12)
    assert rows.tolist() == [[5, 1], [4, 2]] and state.block_ids == ([5, 1], [4])


def test_a_stage_counts_the_graph_sets_of_its_own_layers() -> None:
    """Guards: a pipeline stage that cannot start because other stages' layers have no bytes here, or that sets memory
    aside for levels that look the same from it."""
    layers = object.__new__(RankLayers)
    steps = [LadderStep(format="w8", layers_per_level=2), LadderStep(format="w4", layers_per_level=4)]
    layers._config = MorphServeConfig(ladder=LadderConfig(order="front_to_back", steps=steps))
    layers._vllm_config = of_layers(4)
    layers.linears = {0: {}, 1: {}, 2: {}, 3: {}}
    assert layers.num_graph_sets == 4
    layers.linears = {2: {}, 3: {}}
    assert layers.num_graph_sets == 3


def test_a_kernel_that_cannot_take_the_models_shapes_is_not_chosen() -> None:
    """Guards: a start that ends in the first layer although another kernel would do."""
    assert choose("w8", shapes=[(96, 64)]).name in ("w8a8_vnni", "w8_int16")
    shapes = [(100, 64)]  # these want multiples of 32 or 16
    assert choose("w8", shapes=shapes).name in ("w8a8_onednn", "w8a16_aten", "w8_plain")
    assert choose("w4", shapes=shapes).name == "w4_plain"
    with pytest.raises(KernelError, match="w4a8_vnni: N=100 of a weight.*K=40 is divisible by none"):
        choose("w4", shapes=[(100, 40)])


@pytest.mark.parametrize(
    ("group_sizes", "kernel"), [((), "w4a16_machete"), ((128,), "w4a16_machete"), ((32,), "w4a16_marlin")]
)
def test_the_groups_of_a_checkpoint_choose_the_kernel(
    monkeypatch: pytest.MonkeyPatch, group_sizes: tuple[int, ...], kernel: str
) -> None:
    """Guards: a start on Hopper that ends in the first layer of a checkpoint, because Machete takes no groups of 32."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    def check(kernel: Kernel, device: str) -> KernelReport:
        reason = kernel.unavailable()
        return KernelReport(kernel.name, kernel.format, not reason, reason, 0.5)

    linear = SimpleNamespace(
        quant_method=object.__new__(UnquantizedLinearMethod), weight=torch.empty(256, 384), params_dtype=torch.bfloat16
    )
    home = "morphserve.integration.worker.layers"
    monkeypatch.setattr(f"{home}.find_linears", lambda model: {0: {"o_proj": linear}})
    monkeypatch.setattr(f"{home}.open_source", lambda *_: SimpleNamespace(group_sizes=group_sizes))
    monkeypatch.setattr(RankLayers, "_keep", lambda *_: None)
    monkeypatch.setattr("quant_layers.kernels.selftest.check_kernel", check)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    written = MorphServeConfig(ladder=LadderConfig(steps=[LadderStep(format="w4")]))
    layers = RankLayers(written, SimpleNamespace(model_config=None), 0, GPU)  # type: ignore[arg-type]
    with stand_in_operators():
        layers.capture(torch.nn.Module())
    assert layers.kernels["w4"].name == kernel


def test_a_default_ladder_on_a_gpu_does_without_what_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a GPU whose default ladder does not start for want of one kernel; sets of CUDA graphs for levels that the
    ladder does not have; a step that a user wrote, left out."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    def check(kernel: Kernel, device: str) -> KernelReport:
        runs = kernel.format == "w4" and not kernel.unavailable()
        return KernelReport(kernel.name, kernel.format, runs, "" if runs else "planted", 0.5)

    monkeypatch.setattr("vllm.platforms.current_platform", Platform(90))
    linear = SimpleNamespace(
        quant_method=object.__new__(UnquantizedLinearMethod), weight=torch.empty(256, 384), params_dtype=torch.bfloat16
    )
    home = "morphserve.integration.worker.layers"
    monkeypatch.setattr(f"{home}.find_linears", lambda model: {0: {"o_proj": linear}, 1: {"o_proj": linear}})
    monkeypatch.setattr(f"{home}.open_source", lambda *_: SimpleNamespace(group_sizes=()))
    monkeypatch.setattr(RankLayers, "_keep", lambda *_: None)
    monkeypatch.setattr("quant_layers.kernels.selftest.check_kernel", check)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def capture(config: MorphServeConfig) -> RankLayers:
        layers = RankLayers(config, of_layers(2), 0, GPU)  # type: ignore[arg-type]
        with stand_in_operators():
            layers.capture(torch.nn.Module())
        return layers

    layers = capture(for_this_device(MEASURED, of_layers(2)))
    assert list(layers.kernels) == ["w4"] and list(layers._left_out) == ["fp8"]
    assert layers._levels() == [("base", "base"), ("w4", "base"), ("w4", "w4")] and layers.num_graph_sets == 3
    with pytest.raises(ConfigError, match="no kernel can run fp8 .* Take that format out of ladder.steps"):
        capture(MorphServeConfig(ladder=LadderConfig(steps=[LadderStep(format="fp8"), LadderStep(format="w4")])))
