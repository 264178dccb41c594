"""What a user can get wrong before an engine starts, and what the plugin leaves behind: nothing."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
import vllm.plugins
from checkpoints import quantization_config
from safetensors.torch import save_file
from seams.logged import records_of
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestState

from morphserve.__main__ import main
from morphserve.config import parse_config
from morphserve.errors import ConfigError, SeamError
from morphserve.integration import seams
from morphserve.integration.seams import check
from morphserve.integration.start import settings_of
from morphserve.integration.worker import layers as rank_layers
from morphserve.integration.worker import sources
from morphserve.integration.worker.worker import install_worker_seams
from morphserve.plugin import (
    SCHEDULER_CLS,
    WORKER_EXTENSION_CLS,
    _load_endpoint_plugins,
    install_engine_seams,
    register,
)
from morphserve.residence import HostResidence
from morphserve.version import UNPROVEN_VLLM
from quant_layers import LinearSlot, Part, StoreError, VariantStore, half_of

SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=256,
    max_position_embeddings=512,
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(SIZES, architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5),
    "mamba": dict(
        architectures=["MambaForCausalLM"],
        model_type="mamba",
        hidden_size=64,
        state_size=16,
        num_hidden_layers=2,
        vocab_size=256,
        intermediate_size=128,
        conv_kernel=4,
        expand=2,
        time_step_rank=4,
        layer_norm_epsilon=1e-5,
    ),
    "mixtral": dict(
        SIZES,
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, as vLLM does it; VLLM_PLUGINS is put back after each test."""
    monkeypatch.setenv("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS", ""))
    monkeypatch.delenv("VLLM_PLUGINS")
    register()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories with a config.json and no weights: all that is read before an engine starts."""
    found = {}
    for name, config in MODELS.items():
        directory = tmp_path_factory.mktemp(name)
        (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
        found[name] = str(directory)
    return found


def engine_args(model: str, settings: dict[str, Any] | None, **overrides: Any) -> EngineArgs:
    """Arguments of an engine that was asked for MorphServe with `settings`; None = stock."""
    additional = {} if settings is None else {"morphserve": settings}
    return EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=256,
        block_size=32,
        additional_config=additional,
        **overrides,
    )


# ---- the command line


def parse(*arguments: str) -> argparse.Namespace:
    """As `vllm serve` parses. The model is any local directory: it is not read."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--model", str(Path(__file__).parent), *arguments])


def test_flags_carry_the_settings(tmp_path: Path) -> None:
    """Guards: a flag is gone, is added twice, or its file does not reach the engine."""
    file = tmp_path / "morph.yaml"
    file.write_text("policy: {kind: static, level: w8}\n")
    args = parse("--plugin", "morphserve", "--morphserve-config", str(file))
    engine = AsyncEngineArgs.from_cli_args(args)
    assert type(engine) is AsyncEngineArgs
    assert engine.additional_config == {"morphserve": {"config_file": str(file)}}
    again = AsyncEngineArgs.from_cli_args(args)  # vLLM does so for several API servers
    assert again.additional_config == engine.additional_config


def test_without_the_flag_nothing_is_asked_for() -> None:
    """Guards: the plugin switches itself on."""
    assert not AsyncEngineArgs.from_cli_args(parse()).additional_config


def test_unknown_plugin_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a misspelt plugin name starts a server without it."""
    with pytest.raises(SystemExit) as stopped:
        parse("--plugin", "morphsrve")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "'morphsrve'" in said and "morphserve" in said


def test_config_without_the_plugin_is_an_error(tmp_path: Path) -> None:
    """Guards: a config file that nobody reads."""
    with pytest.raises(SystemExit, match="no effect without --plugin morphserve. Add it"):
        AsyncEngineArgs.from_cli_args(parse("--morphserve-config", str(tmp_path / "x.yaml")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ladderr: {}\n", ["morph.yaml", "ladderr", "morphserve init"]),
        ("transition: {max_pause_ms: -3}\n", ["transition.max_pause_ms", "greater than 0", "-3"]),
        ("policy: {kind: slow}\n", ["policy", "slow", "'static'", "'threshold'"]),
        ("policy: [\n", ["morph.yaml", "not valid YAML"]),
        ("- 1\n", ["top level is list, must be a mapping"]),
        (None, ["morph.yaml", "No such file", "Give a readable YAML file"]),
    ],
)
def test_bad_yaml_stops_the_command_line(tmp_path: Path, text: str | None, said: list[str]) -> None:
    """Guards: a typo is ignored, or shows minutes later as a traceback of a worker."""
    file = tmp_path / "morph.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        AsyncEngineArgs.from_cli_args(parse("--plugin", "morphserve", "--morphserve-config", str(file)))
    for part in ("morphserve: error:", *said):
        assert part in str(stopped.value.code)


def test_settings_from_two_places_are_an_error(tmp_path: Path) -> None:
    """Guards: one of two contradicting settings wins in silence."""
    file = tmp_path / "morph.yaml"
    file.write_text("{}\n")
    inline = json.dumps({"morphserve": {"policy": {"kind": "static", "level": 0}}})
    args = parse("--plugin", "morphserve", "--morphserve-config", str(file), "--additional-config", inline)
    with pytest.raises(SystemExit, match="Give one of them"):
        AsyncEngineArgs.from_cli_args(args)


RUST = "VLLM_USE_RUST_FRONTEND"


@pytest.mark.parametrize("asked", [["--plugin", "morphserve"], ["--additional-config", '{"morphserve": {}}']])
@pytest.mark.parametrize(
    ("value", "rust", "words"),
    [
        ([], "1", f"{RUST}=1: vLLM's Rust .* Unset {RUST}."),
        (["--grpc"], "0", "--grpc: vLLM's gRPC .* Leave out --grpc."),
    ],
)
def test_a_front_end_that_has_nothing_of_ours_is_refused(
    asked: list[str], value: list[str], rust: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a server without metrics, orders and reload, and no word of it; a stock one that is refused."""
    monkeypatch.setenv(RUST, rust)
    parser = FlexibleArgumentParser()
    commands = parser.add_subparsers(dest="subparser")
    ServeSubcommand().subparser_init(commands)

    def args(*arguments: str) -> argparse.Namespace:
        given = parser.parse_args(["serve", str(Path(__file__).parent), *arguments])
        given.model = given.model_tag  # as `vllm serve` does
        return given

    with pytest.raises(SystemExit, match=f"^morphserve: error: {words}"):
        AsyncEngineArgs.from_cli_args(args(*value, *asked))
    AsyncEngineArgs.from_cli_args(args(*value))
    monkeypatch.setenv(RUST, "0")
    AsyncEngineArgs.from_cli_args(args(*asked))


@pytest.mark.parametrize("module", ["vllm.entrypoints.launchers.grpc_server", "vllm.entrypoints.grpc_server"])
def test_a_module_that_serves_grpc_is_refused(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the refusal of `--grpc`, passed by whoever starts its module as vLLM's documentation also does."""
    assert importlib.util.find_spec(module), "it has another name now"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name=module))
    model = str(Path(__file__).parent)
    with pytest.raises(SystemExit, match=rf"^morphserve: error: python -m {module}: .* Start `vllm serve`\.$"):
        AsyncEngineArgs.from_cli_args(parse("--model", model, "--plugin", "morphserve"))
    AsyncEngineArgs.from_cli_args(parse("--model", model))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="somebodys.grpc_server"))
    AsyncEngineArgs.from_cli_args(parse("--model", model, "--plugin", "morphserve"))


# ---- the engine's configuration


def test_inert_without_the_plugin(models: dict[str, str]) -> None:
    """Guards: an installed plugin changes servers that never asked for it."""
    config = engine_args(models["llama"], None).create_engine_config()
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_extension_cls == ""
    assert "VLLM_PLUGINS" not in os.environ


def test_active_with_the_plugin(models: dict[str, str]) -> None:
    """Guards: the refusals below refuse everything."""
    config = engine_args(models["llama"], {}).create_engine_config()
    assert config.scheduler_config.scheduler_cls == SCHEDULER_CLS
    assert config.parallel_config.worker_extension_cls == WORKER_EXTENSION_CLS
    assert [p.name for p in vllm.plugins.load_endpoint_plugins(("generate",))] == ["morphserve"]
    assert hasattr(RequestState.make_request_output, "__wrapped__"), "or of several choices one has a receipt"
    assert hasattr(AsyncLLM.generate, "__wrapped__"), "or where no door is marks are forged"
    assert "VLLM_PLUGINS" not in os.environ, "with which vLLM's resolver of adapters would download"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ladderr": {}}, ["ladderr", "morphserve init"]),
        ({"transition": {"max_layers_per_step": 0}}, ["max_layers_per_step", "greater than or equal to 1"]),
        ({"ladder": {"order": [0, 99]}}, ["[99]", "layers 0 to 1", "Remove"]),
        ({"ladder": {"steps": [{"format": "w8", "layers": 7}]}}, ["is 7", "2 decoder layers", "Give 1 to 2"]),
        ({"ladder": {"steps": [{"format": "w4"}, {"format": "w8"}]}}, ["frees nothing", "wide to narrow"]),
        ({"policy": {"kind": "static", "level": 99}}, ["level 99", "0 to 1", "Give one of these"]),
        ({"policy": {"kind": "static", "level": "w2"}}, ["'w2'", "8bit, 4bit", "(base, w8)"]),
        ({"policy": {"kind": "threshold", "max_level": 99}}, ["level 99", "0 to 1", "Give one of these"]),
        ({"kv": {"base_num_blocks": 8}}, ["8 blocks", "needs 9 blocks", "Raise kv.base_num_blocks"]),
        ({"kernels": {"w8": "no_such_kernel"}}, ["kernels: w8", "'no_such_kernel'", "w8a8_onednn", "Name one of them"]),
        ({"kernels": {"w4": "w8a8_vnni"}}, ["kernels: w4", "'w8a8_vnni'", "w4a16"]),
        ({"cache_dir": "/dev/null"}, ["cache_dir: /dev/null", "no directory that this user can write to"]),
        ({"cache_dir": "/dev/null/a/b"}, ["cache_dir: /dev/null/a/b: /dev/null is no directory"]),
        ({"decision_log": "/dev/null/a.jsonl"}, ["decision_log: /dev/null: /dev/null is no directory"]),
        ({"admin": {"token_file": "/nowhere/token"}}, ["token file /nowhere/token", "No such file"]),
        ({"variants": {"w4": "/no/such/checkpoint"}}, ["variants: w4", "/no/such/checkpoint", "Give either"]),
    ],
)
def test_bad_settings_are_refused(models: dict[str, str], settings: dict[str, Any], said: list[str]) -> None:
    """Guards: settings that cannot work for this model reach a worker, or are ignored."""
    with pytest.raises(ConfigError) as refused:
        engine_args(models["llama"], settings).create_engine_config()
    for part in said:
        assert part in str(refused.value)


def test_places_that_cannot_be_written_to_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    """Guards: minutes of loading before somebody opens the decision log; or a refusal of what will be made."""
    with pytest.raises(ConfigError, match="decision_log: .* is no file that this user can write to"):
        engine_args(models["llama"], {"decision_log": str(tmp_path)}).create_engine_config()
    made = {"decision_log": str(tmp_path / "a" / "log.jsonl"), "cache_dir": str(tmp_path / "b" / "c")}
    engine_args(models["llama"], made).create_engine_config()
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_to_is_got_round_with_one_warning(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: no server in a container without a writable home, one that packs where others can write, or a second
    directory for each start."""
    monkeypatch.delenv("MORPHSERVE_CACHE", raising=False)
    monkeypatch.setattr("morphserve.integration.start.places.cache_root", lambda: Path("/dev/null/cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("morphserve.integration.start.places.logger", logging.getLogger("test.places"))
    settings = {"cache_dir": "/dev/null/cache"}
    for _ in range(2):
        caplog.clear()
        stated = settings_of(engine_args(models["llama"], settings).create_engine_config())
        assert stated is not None and stated.cache_dir == tmp_path / f"morphserve-{os.geteuid()}"
        (warning,) = [text for text in _warnings(caplog) if "/dev/null is no directory" in text]
        assert "MORPHSERVE_CACHE" in warning and str(stated.cache_dir) in warning
    assert stat.S_IMODE(stated.cache_dir.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="prepare: when_idle: what is made must be kept"):
        engine_args(models["llama"], {**settings, "prepare": "when_idle"}).create_engine_config()
    stated.cache_dir.chmod(0o777)
    with pytest.raises(ConfigError, match="open to others. Set cache_dir, or MORPHSERVE_CACHE"):
        engine_args(models["llama"], settings).create_engine_config()
    monkeypatch.setenv("MORPHSERVE_CACHE", "/dev/null/cache")
    with pytest.raises(ConfigError, match="cache_dir: /dev/null/cache: /dev/null is no directory .* Give another"):
        engine_args(models["llama"], settings).create_engine_config()


def test_a_checkpoint_of_another_model_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    """Guards: minutes of loading before somebody looks at the checkpoint that a format's layers are to come from."""
    with pytest.raises(ConfigError, match="variants: w4: .*config.json has no quantization_config"):
        engine_args(models["llama"], {"variants": {"w4": models["llama"]}}).create_engine_config()
    other = {**MODELS["llama"], "hidden_size": 128, "quantization_config": quantization_config("awq", 32)}
    (tmp_path / "config.json").write_text(json.dumps(other))
    save_file({"model.layers.0.mlp.up_proj.qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="variants: w4: .*hidden_size 128 instead of 64"):
        engine_args(models["llama"], {"variants": {"w4": str(tmp_path)}}).create_engine_config()


@pytest.mark.parametrize(
    ("name", "said"), [("mamba", "no attention layers"), ("mixtral", "mixture of experts")]
)
def test_models_without_dense_layers_are_refused(models: dict[str, str], name: str, said: str) -> None:
    """Guards: a model that cannot be morphed dies in the loader instead of at the door."""
    with pytest.raises(ConfigError) as refused:
        engine_args(models[name], {}).create_engine_config()
    assert models[name] in str(refused.value) and said in str(refused.value)
    assert "Start without --plugin morphserve" in str(refused.value)


@pytest.mark.parametrize("field", ["scheduler_cls", "worker_extension_cls"])
def test_a_taken_class_seam_is_refused(models: dict[str, str], field: str) -> None:
    """Guards: the class of another plugin is thrown out in silence, or ours is."""
    with pytest.raises(ConfigError) as refused:
        engine_args(models["llama"], {}, **{field: "another.plugin.Class"}).create_engine_config()
    assert field in str(refused.value) and "'another.plugin.Class'" in str(refused.value)
    assert "remove one of the two" in str(refused.value)


def test_vllms_own_growth_of_the_cache_is_off(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a vLLM that maps blocks behind the cache by itself, as is its default where it can, beside ours."""
    monkeypatch.setattr(EngineArgs, "enable_extensible_kv_cache", None, raising=False)
    stock, morphing = engine_args(models["llama"], None), engine_args(models["llama"], {})
    for args, kept in ((stock, None), (morphing, False)):
        args.create_engine_config()
        assert args.enable_extensible_kv_cache is kept
    morphing.enable_extensible_kv_cache = True
    with pytest.raises(ConfigError, match="is True: .*only one can. Leave out --enable-extensible-kv-cache"):
        morphing.create_engine_config()


def test_todays_vllm_does_not_grow_its_cache() -> None:
    """Guards: a new vLLM whose growth under the same addresses goes unnoticed: red when it has come, docs/kv.md."""
    assert "enable_extensible_kv_cache" not in {field.name for field in dataclasses.fields(EngineArgs)}


def test_command_line_gets_one_line(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a user of `vllm serve` reads a traceback where one line says it all."""
    monkeypatch.setattr("sys.argv", ["/usr/bin/vllm", "serve"])
    with pytest.raises(SystemExit, match="morphserve: error: .*mixture of experts"):
        engine_args(models["mixtral"], {}).create_engine_config()


# ---- the variants on disk


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that does what a rank does with the weights it has loaded; returns the variant files."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 64, dtype=torch.bfloat16), requires_grad=False)
    method = UnquantizedLinearMethod()
    proj = SimpleNamespace(weight=weight, quant_method=method, params_dtype=weight.dtype, input_size_per_partition=64)
    linears = {0: {"proj": proj}}
    monkeypatch.setattr(rank_layers, "find_linears", lambda model: linears)
    config = parse_config({"cache_dir": str(tmp_path), "ladder": {"steps": [{"format": "w8"}]}})

    def capture(then: Callable[[Any], Any] = lambda layers: None) -> list[Path]:
        vllm_config = SimpleNamespace(model_config=None)
        layers = rank_layers.RankLayers(config, vllm_config, 0, HostResidence())
        layers.capture(torch.nn.Module())
        then(layers)
        return sorted(tmp_path.rglob("*.safetensors"))

    return capture


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "header"])
def test_damaged_files_are_made_again_at_the_start(stored: Any, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a damaged layer found when a burst needs it, or served, or one that keeps a server from starting although
    all that it is made of is there."""
    files = stored()
    whole = {file: file.read_bytes() for file in files}
    assert stored() == files and not _warnings(caplog)  # undamaged, they are used as they are
    for file, content in whole.items():
        if damage == "missing":
            file.unlink()
        elif damage == "header":
            file.write_bytes(bytes(20) + content[20:])
        else:
            file.write_bytes(content[:-10] if damage == "truncated" else content[:-10] + bytes(10))
    stored()
    assert {file: file.read_bytes() for file in files} == whole
    (said,) = _warnings(caplog)
    assert "files of 2 layers are made again" in said and str(files[0]) in said


def test_a_base_that_is_not_what_was_loaded_is_made_again(stored: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a file that is whole by its manifest, of other tensors than those that serve: the first restore would end
    "level 0 is stock"."""
    base = next(file for file in stored() if ".base." in file.name)
    mine, directory = base.read_bytes(), base.parent
    fingerprint = json.loads((directory / "manifest.json").read_text())["fingerprint"]
    other = torch.zeros(128, 64, dtype=torch.bfloat16)
    VariantStore.open(directory, fingerprint).write(0, "base", {"proj": {"weight": other}})
    assert not base.exists()
    stored()
    assert base.read_bytes() == mine
    (said,) = _warnings(caplog)
    assert "layer 0 'base': proj/weight is not what was loaded" in said


def test_what_was_made_again_is_verified_too(stored: Any) -> None:
    """Guards: a layer that was made again at the start, and from then on is read without being looked at."""
    files = stored()

    def change() -> None:
        for file in files:
            file.write_bytes(file.read_bytes()[:-10] + bytes(10))

    def read(layers: Any) -> None:
        change()
        with pytest.raises(StoreError, match="changed since it was verified"):
            layers._parts.store.read(0, "base")

    change()
    stored(read)


class _Loaded:
    """What vLLM made of the weight of `stored`."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.nbytes, self.bias = weight, weight.nbytes, None

    def take(self) -> _Loaded:
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


def _look(layers: Any) -> None:
    """Do with the captured layers what `install` does before it lets the swapper go."""
    loaded, part = _Loaded(layers.linears[0]["proj"].weight.data), Part(0, half_of("proj"), "base")
    layers._slots[0] = {"proj": LinearSlot("proj", loaded)}
    swapper = layers._swapper({part: layers._parts.adopt(part, {"proj": loaded})}, {})
    assert swapper.staging_bytes == 0 and swapper.formats() == {0: "base"}


def test_a_format_that_computes_something_else_stops_the_start(stored: Any) -> None:
    """Guards: garbage that is whole by every hash, of a kernel, a checkpoint or a fold at fault, met by a burst."""
    stored(_look)

    def write_another(layers: Any) -> None:
        packed = layers.kernels["w8"].pack(torch.randn(128, 64, dtype=torch.bfloat16))
        layers._parts.store.write(0, "w8", {"proj": packed}, layers._parts.store.entry(0, "w8").kernel)

    stored(write_another)
    with pytest.raises(ConfigError, match=r"layer 0: proj in w8 compute something else .*delete .*ladder.steps"):
        stored(_look)


def test_the_wait_for_files_has_bounds_of_its_own() -> None:
    """Guards: steps that stand still for as long as a pause may be, while a disk is away; a rank that waits for its
    files until its controller has given it up."""
    for given, pause_s, timeout_s in (({"max_pause_ms": 20, "rank_timeout_s": 8}, 0.02, 4.0),
                                      ({"max_pause_ms": 9000, "rank_timeout_s": 20}, 1.0, 10.0)):  # fmt: skip
        config = parse_config({"transition": given})
        patience = rank_layers.RankLayers(config, SimpleNamespace(), 0, HostResidence()).patience
        assert (patience.pause_s, patience.timeout_s) == (pause_s, timeout_s)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in records_of(caplog) if record.levelno >= logging.WARNING]


def test_a_shape_that_the_first_kernels_refuse_goes_to_one_behind_them(
    stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a model refused when it is packed, although a kernel that takes any shape would have served it."""
    asked: list[Any] = []
    original = sources.choose
    monkeypatch.setattr(sources, "choose", lambda *arguments: (asked.append(arguments[4]), original(*arguments))[1])
    weight = torch.nn.Parameter(torch.randn(100, 64, dtype=torch.bfloat16), requires_grad=False)
    rank_layers.find_linears(torch.nn.Module())[0]["proj"].weight = weight
    assert len(stored()) == 2 and asked == [[(100, 64)]]


# ---- seams


def test_all_seams_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the installed vLLM is inside the supported range, but not the one we were written against."""
    assert [r for r in seams.check_all() if not r.ok] == []
    main(["check"])  # whose status tests/seams/test_check.py and tests/engine/test_check_engine.py hold to account
    assert f"{len(seams.SEAMS) + 1} seams, all hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "params", "said"),
    [
        ("vllm.v1.core.sched.scheduler:Scheduler.schedule", ("no_such_parameter",), "['no_such_parameter']"),
        ("vllm.v1.core.sched.scheduler:Scheduler.no_such_method", (), "AttributeError"),
        ("vllm.no_such_module:f", (), "ModuleNotFoundError"),
        ("vllm.v1.core.sched.scheduler:Scheduler.max_num_running_reqs", (), "AttributeError"),
    ],
)
def test_a_broken_seam_stops_the_start(
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    params: tuple[str, ...],
    said: str,
) -> None:
    """Guards: a vLLM whose insides have moved is patched half-way."""
    row = seams.Seam("moved", target, params, "test")
    monkeypatch.setattr(check, "SEAMS", (*seams.SEAMS, row))
    with pytest.raises(SeamError) as refused:
        engine_args(models["llama"], {}).create_engine_config()
    assert f"moved ({target})" in str(refused.value) and said in str(refused.value)
    assert "1 of" in str(refused.value) and "start without --plugin morphserve" in str(refused.value)
    assert main(["check"]) == 1
    assert "FAIL moved" in capsys.readouterr().out


def test_a_foreign_version_stops_the_start(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: an untested vLLM is patched because its names happen to match; one that is to be tried all the same, and
    then starts without a word, or with one at each engine (tests/cpu/test_seam_version.py has the rest)."""
    monkeypatch.setattr(check, "SUPPORTED_VLLM", ">=0.1,<0.2")
    monkeypatch.delenv(UNPROVEN_VLLM, raising=False)
    with pytest.raises(SeamError, match=r"version .*supported >=0.1,<0.2"):
        seams.require_all()
    monkeypatch.setenv(UNPROVEN_VLLM, "1")
    check._warn_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for _ in range(2):
        engine_args(models["llama"], {}).create_engine_config()
    (warned,) = [record for record in records_of(caplog) if UNPROVEN_VLLM in record.getMessage()]
    assert warned.levelno == logging.WARNING and vllm.__version__ in warned.getMessage()


@pytest.fixture
def unpatched() -> Iterator[None]:
    """vLLM without our wrappers inside the test, and exactly as before after it."""
    before = seams.patches()
    seams.undo()
    yield
    seams.undo()
    for patch in before:
        seams.put(patch.row, patch.name, patch.ours, patch.owner)


def test_install_twice_is_install_once_and_has_an_inverse(unpatched: None) -> None:
    """Guards: a wrapper calls a wrapper, or a test or a host keeps a patched vLLM."""
    targets = [
        seams.resolve(seam.target)[:2] for seam in seams.SEAMS if ":" in seam.target and "." in seam.target
    ]
    weights = seams.WORKER_WEIGHTS  # of a class, whose methods are its row's attributes
    targets += [(seams.resolve(weights.target)[2], name) for name in weights.attributes]
    found = {(owner, name): vars(owner).get(name) for owner, name in targets}
    for install in (register, install_engine_seams, install_worker_seams):
        install()
        before = [(patch, patch.ours) for patch in seams.patches()]
        install()
        assert [(patch, patch.ours) for patch in seams.patches()] == before
    patched = {(patch.owner, patch.name) for patch in seams.patches()}
    wrapped = {(owner, name) for owner, name in patched if not name.startswith("morphserve_")}
    assert len(patched) == len(seams.patches()) == len(wrapped) + 3 == 19
    assert wrapped <= set(found), "a wrapped symbol has no row in the seam table"
    assert all(vars(owner)[name] is not found[owner, name] for owner, name in wrapped)
    seams.undo()
    assert not any(name in vars(owner) for owner, name in patched - wrapped) and seams.patches() == []
    for (owner, name), original in found.items():
        assert vars(owner).get(name) is original, f"{owner}.{name} is not what it was"


# ---- VLLM_PLUGINS


class Endpoint:
    """As far as vLLM looks at one before it attaches it."""

    required_tasks = None

    def __init__(self, name: str) -> None:
        self.name = name


GROUPS = {
    "lora_hf_hub_resolver": "general_plugins",
    "morphserve": "general_plugins endpoint_plugins",
    "one_name": "general_plugins endpoint_plugins",
    "other_routes": "endpoint_plugins",
    "other_platform": "platform_plugins",
}


@pytest.mark.parametrize(
    ("before", "loaded"),
    [
        (None, ["morphserve"]),
        ("", ["morphserve"]),
        ("morphserve", ["morphserve"]),
        ("other_routes,other_platform", ["morphserve", "other_routes"]),
        ("one_name,morphserve", ["morphserve", "one_name"]),
    ],
)
def test_no_plugin_but_ours_is_named(monkeypatch: pytest.MonkeyPatch, before: str | None, loaded: list[str]) -> None:
    """Guards: to be loaded we switch on what nobody allowed: another's routes, or vLLM's resolver, which downloads
    adapters once it is named; or we switch others off."""
    installed = EntryPoints(
        EntryPoint(name, "x:y", f"vllm.{group}") for name, groups in GROUPS.items() for group in groups.split()
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **kw: installed.select(**kw) if kw else installed)
    monkeypatch.setattr(EntryPoint, "load", lambda self: lambda: Endpoint(self.name))
    if before is not None:
        monkeypatch.setenv("VLLM_PLUGINS", before)
    seen: list[str] = []
    original = getattr(vllm.plugins.load_endpoint_plugins, "__wrapped__", vllm.plugins.load_endpoint_plugins)

    def load(*args: Any) -> Any:
        seen.append(os.environ["VLLM_PLUGINS"])
        return original(*args)

    assert sorted(plugin.name for plugin in _load_endpoint_plugins(load)(("generate",))) == loaded
    assert os.environ.get("VLLM_PLUGINS") == before
    assert set(seen[0].split(",")) - {""} == {*(before or "").split(","), "morphserve"} - {""}


def test_a_failing_load_leaves_the_list_as_it_was() -> None:
    """Guards: a plugin that breaks the loading leaves our name to the processes that are started later."""

    def breaks() -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        _load_endpoint_plugins(breaks)()
    assert "VLLM_PLUGINS" not in os.environ
