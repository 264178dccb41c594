"""What users hand us that is nonsense: each reader answers with one of our errors, and never with a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from morphserve.config import load_config, parse_config, parse_policy
from morphserve.control.decisions.replay_log import read_log, replay
from morphserve.errors import ConfigError, MorphServeError
from morphserve.prepared import weights_fingerprint
from morphserve.serve_dtype import model_dtype
from morphserve.shipped import DEFAULT_CONFIG
from morphserve.tools.profile.text import read_text
from morphserve.tools.sim import load_calibration
from morphserve.tools.tune.space import load_space
from morphserve.tools.workload import read_windows
from morphserve.user_input import MAX_BYTES, parse_yaml, user_path
from quant_layers import Checkpoint, CheckpointError, QuantError, StoreError, read_profile
from quant_layers.store.tensorfile import _MAX_HEADER_BYTES, read_file

pytestmark = pytest.mark.cpu

fuzzed = settings(
    max_examples=60, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # a busy machine is no fault
)  # fmt: skip

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
    | st.sampled_from(["four", "~nosuchuser/x", "a\0b", "2024-13-45", "w8", "base", "\ud800", "9" * 5000])
)  # fmt: skip
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty. Write what is to differ"),
        ("# only a remark\n", "is empty. Write what is to differ"),
        ("kv: {max_preemptions: 1}\nkv: {drain_timeout_s: 3}\n", "line 2, column 1: key 'kv' is given twice"),
        ("policy: {kind: static, kind: slo}\n", "key 'kind' is given twice"),
        ("profile: 2024-13-45x\nversion: 2024-01-01\n", "version: Input should be 1 (got '2024-01-01')"),
        ("version: 2024-13-45\n", "(got '2024-13-45')"),
        ("version: !!timestamp 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        ("[" * 20_000, "nested deeper than 30"),
        ("a: &a [*a]\n", "an alias of what it stands in"),
        ("kv: !!int four\n", "not valid YAML: invalid literal for int()"),
        ("kv: {max_num_blocks: " + "9" * 5000 + "}\n", "Exceeds the limit"),
        ("profile: ~nosuchuser/x\n", "~nosuchuser/x: nobody here has that home directory. Write the path out"),
        ('cache_dir: "a\\0b"\n', "is no path: too long, or of what no name has"),
        ("profile: a/" + "b" * 256, "is no path: too long"),
        ('decision_log: "\\ud800"\n', "is no path: too long, or of what no name has"),
        ("ladder: {order: [" + "1, " * 5000 + "x]}\n", "..."),
        ("kv: \x00", "special characters are not allowed"),
        ("- kv", "top level is list, must be a mapping"),
        ("1: 2", "Keys should be strings"),
        ("--- {}\n--- {}\n", "but found another document"),
        (" " * (MAX_BYTES + 1), "more than 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_a_config_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    """Guards: a traceback, a page of pydantic, or defaults that nobody asked for."""
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert words in str(error.value) and str(file) in str(error.value), str(error.value)[:500]
    assert len(str(error.value)) < 2000


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    """Guards: a server that reads a device until its memory is full, or ends in a traceback of pathlib."""
    (tmp_path / "latin").write_bytes(b"a: \xe9 b")
    for path, words in (
        ("~nosuchuser/x.yaml", "nobody here has that home directory"),
        ("/dev/zero", "more than 1,048,576 bytes"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "latin", "not UTF-8 text (invalid continuation byte at byte 3)"),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(path)
        assert words in str(error.value)


def test_aliases_that_grow_are_bounded() -> None:
    """Guards: nine lines that take all memory; a merge key, which people use, refused with them."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    with pytest.raises(ConfigError, match="more than 100,000 values with aliases written out"):
        parse_yaml("\n".join(lines))
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: *a")["b"] == {"x": 3, "y": 2}


def test_a_home_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a container whose user has no home ends in a traceback."""
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.delenv("MORPHSERVE_CACHE", raising=False)
    with pytest.raises(ConfigError, match="or set HOME"):
        user_path("~/.cache")
    with pytest.raises(ConfigError, match="Set MORPHSERVE_CACHE to a directory"):
        parse_config({})


def test_a_key_twice_in_json_is_refused() -> None:
    """Guards: the later of two values taken without a word."""
    with pytest.raises(ConfigError, match="is given twice"):
        parse_policy('{"policy": {"kind": "static", "level": 0, "level": 1}}', "body")


@fuzzed
@given(st.text(max_size=80) | st.text("{}[]:,-&*!<>|'\"#%@ \n\tab1.~?", max_size=60) | st.binary(max_size=60))
def test_any_text_is_a_config_or_an_error(tmp_path: Path, text: str | bytes) -> None:
    """Guards: a text that YAML, or what we made stricter of it, meets with an exception of its own."""
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    answers(lambda: load_config(file))


def keys_of(raw: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inside = raw.items() if isinstance(raw, dict) else ()
    return ([path] if path else []) + [found for key, value in inside for found in keys_of(value, (*path, key))]


DEFAULTS: dict[str, Any] = yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8"))
KEYS = keys_of({key: value for key, value in DEFAULTS.items() if value is not None})


@fuzzed
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_at_any_key_is_taken_or_refused(key: tuple[str, ...], value: Any) -> None:
    """Guards: a key whose check raises what it should not, on a value that its author did not think of."""
    raw = json.loads(json.dumps(DEFAULTS))
    part = raw
    for name in key[:-1]:
        part = part[name]
    part[key[-1]] = value
    answers(lambda: parse_config(raw))


def answers(read: Callable[[], Any]) -> None:
    """Read; an error must be one of ours, with one line's worth of words."""
    try:
        read()
    except (MorphServeError, QuantError) as e:
        assert 0 < len(str(e)) < 20_000
    except ValueError as e:  # of `policies`, which have no errors of their own
        assert type(e) is ValueError, repr(e)


# ---- traces, step times, logs: lines and documents of JSON

TIMES: dict[str, Any] = {
    "schema": 1, "formats": {"base": {"base_s": 0.01, "per_seq_s": 1e-4, "per_prefill_token_s": 1e-5,
    "per_context_token_s": 1e-7}}, "move": {"degrade_s": 0.001, "restore_s": 0.001}, "offset_s": 0.0, "residuals": {},
    "model_bytes": {"layers": {"base": [10, 10]}, "kv_block_bytes": 10, "block_size": 32}, "weights": "",
}  # fmt: skip
REQUEST = {"timestamp": 0, "input_length": 3, "output_length": 4, "hash_ids": [1]}


def spoilt(document: dict[str, Any]) -> st.SearchStrategy[Any]:
    """The document with any value at one of its keys, however deep, or something else altogether."""

    def put(key: tuple[str, ...], value: Any) -> Any:
        raw = json.loads(json.dumps(document))
        part = raw
        for name in key[:-1]:
            part = part[name]
        part[key[-1]] = value
        return raw

    return st.builds(put, st.sampled_from(keys_of(document)), VALUES) | VALUES


@fuzzed
@given(spoilt(TIMES))
def test_any_step_times_are_read_or_refused(tmp_path: Path, raw: Any) -> None:
    """Guards: a calibration that somebody edited ends a simulation in a traceback."""
    file = tmp_path / "times.json"
    file.write_text(json.dumps(raw), encoding="utf-8")
    answers(lambda: load_calibration(file))


@fuzzed
@given(st.lists(spoilt(REQUEST), min_size=1, max_size=3), st.sampled_from(["t.jsonl", "t.jsonl:window=0,5", "t.csv"]))
def test_any_trace_is_read_or_refused(tmp_path: Path, rows: list[Any], window: str) -> None:
    """Guards: a trace with one line of another kind."""
    lines = [json.dumps(row) for row in rows]
    if window == "t.csv":
        lines = ["arrived_at,num_prefill_tokens,num_decode_tokens", *(line[:200] for line in lines)]
    (tmp_path / window.partition(":")[0]).write_text("\n".join(lines), encoding="utf-8")
    answers(lambda: read_windows([str(tmp_path / window)]))


@fuzzed
@given(VALUES)
def test_any_list_of_windows_or_space_is_read_or_refused(tmp_path: Path, value: Any) -> None:
    """Guards: a YAML of another kind than the command wants."""
    file = tmp_path / "list.yaml"
    for raw in (value, [{"file": value}], {"threshold": {"degrade_above": value}}, {"slo": {"ttft_s": {"low": value}}}):
        file.write_text(yaml.safe_dump(raw, allow_unicode=False), encoding="utf-8")
        answers(lambda: read_windows([str(file)]))
        for kind in ("threshold", "slo"):
            answers(lambda kind=kind: load_space(file, parse_config({"policy": {"kind": kind}})))  # type: ignore[misc]


@fuzzed
@given(st.binary(max_size=80) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_a_log_and_a_text_or_none(tmp_path: Path, content: bytes) -> None:
    """Guards: a log or a text of another kind, or a damaged one."""
    for name in ("log", "text.jsonl", "text.txt"):
        (tmp_path / name).write_bytes(content)
    assert all(line is not None for _, line in read_log(tmp_path / "log"))
    answers(lambda: replay(tmp_path / "log"))
    answers(lambda: read_text(tmp_path / "text.jsonl"))
    answers(lambda: read_text(tmp_path / "text.txt"))


def test_json_that_is_nested_too_deep(tmp_path: Path) -> None:
    """Guards: the one error of a JSON reader that is no ValueError."""
    for name in ("t.jsonl", "config.json", "manifest.json", "times.json"):
        (tmp_path / name).write_text('{"timestamp":' + "[" * 100_000, encoding="utf-8")
    for read in (
        lambda: read_windows([str(tmp_path / "t.jsonl")]),
        lambda: load_calibration(tmp_path / "times.json"),
        lambda: Checkpoint.open(tmp_path),
        lambda: read_profile(tmp_path),
        lambda: read_text(tmp_path / "t.jsonl"),
    ):
        with pytest.raises((MorphServeError, QuantError)):
            read()
    assert model_dtype(str(tmp_path)) is None and weights_fingerprint(tmp_path) is None


# ---- checkpoints and tensors

QUANTIZED = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": "four"}, "'four'"),
        ({"quant_method": "gptq", "bits": None}, "NoneType"),
        ({"quant_method": "gptq", "bits": 1e400}, "infinity"),
        ({"quant_method": "awq", "bits": 4, "group_size": "large"}, "'large'"),
        ({"quant_method": "compressed-tensors", "config_groups": ["w4"]}, "'list'"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": "w4"}}, "'str'"),
        (["gptq"], "'list'"),
        ("gptq", "'str'"),
    ],
)  # fmt: skip
def test_a_scheme_that_is_none(config: Any, words: str, tmp_path: Path) -> None:
    """Guards: `invalid literal for int()` in place of which checkpoint, what in it, and what to do."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}), encoding="utf-8")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    said = str(error.value)
    assert str(tmp_path) in said and words in said and "quantization config" in said and "fetch it again" in said


def a_checkpoint(directory: Path) -> Path:
    """A whole one of a layer, which the readers take."""
    parts = {
        "qweight": torch.zeros(4, 8, dtype=torch.int32), "scales": torch.ones(1, 8), "g_idx": torch.zeros(32).int(),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
    }  # fmt: skip
    save_file({f"model.layers.0.mlp.up_proj.{name}": part for name, part in parts.items()}, directory / "m.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": QUANTIZED}), encoding="utf-8")
    return directory / "m.safetensors"


def read_all(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    assert len(checkpoint.digest) == 64
    checkpoint.check_shape({})
    checkpoint.layer(0)
    list(checkpoint.outside())


def test_a_whole_checkpoint_is_read(tmp_path: Path) -> None:
    """Guards: the tests below, which could not tell readers that refuse everything."""
    a_checkpoint(tmp_path)
    read_all(tmp_path)


@fuzzed
@given(spoilt(QUANTIZED))
def test_any_quantization_config_is_read_or_refused(tmp_path: Path, raw: Any) -> None:
    """Guards: the same, of values that nobody has thought of."""
    a_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": raw}), encoding="utf-8")
    answers(lambda: read_all(tmp_path))


ROW = {"dtype": "I32", "shape": [1, 2], "data_offsets": [0, 8]}
HEADER: dict[str, Any] = {"model.layers.0.mlp.up_proj.qweight": ROW}
LENGTHS = st.sampled_from([0, 1, 1 << 20, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
FILES = st.builds(
    lambda header, length, rest: (len(header) if length is None else length).to_bytes(8, "little") + header + rest,
    spoilt(HEADER).map(lambda raw: json.dumps(raw).encode()), st.none() | LENGTHS, st.binary(max_size=24),
)  # fmt: skip


@fuzzed
@given(FILES | st.binary(max_size=40), st.booleans())
def test_any_safetensors_file_is_read_or_refused(tmp_path: Path, content: bytes, with_index: bool) -> None:
    """Guards: a header that claims more bytes than there are, in a file that nobody has opened before us."""
    file = a_checkpoint(tmp_path)
    file.write_bytes(content)
    index = {"weight_map": dict.fromkeys(HEADER, file.name)}
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    if with_index:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    answers(lambda: read_all(tmp_path))
    weights_fingerprint(tmp_path)
    with file.open("rb", buffering=0) as stream:
        answers(lambda: read_file(file, stream))


@pytest.mark.parametrize("length", [1 << 31, 1 << 62, (1 << 64) - 1])
def test_a_header_that_claims_all_memory(length: int, tmp_path: Path) -> None:
    """Guards: a MemoryError, or minutes of swapping, for eight bytes of a file."""
    file = a_checkpoint(tmp_path)
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    index = {"weight_map": dict.fromkeys(HEADER, file.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.digest) == 64
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.layer(0)
    assert weights_fingerprint(tmp_path) is None
    with file.open("rb", buffering=0) as stream, pytest.raises(StoreError, match=f"claims {length} bytes"):
        read_file(file, stream)


@fuzzed
@given(spoilt({"weight_map": {"model.layers.0.mlp.up_proj.qweight": "m.safetensors"}}))
def test_any_index_is_read_or_refused(tmp_path: Path, raw: Any) -> None:
    """Guards: an index whose entries are no files."""
    a_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(raw), encoding="utf-8")
    answers(lambda: read_all(tmp_path))
    weights_fingerprint(tmp_path)


@fuzzed
@given(
    st.dictionaries(
        st.sampled_from(["qweight", "scales", "qzeros", "g_idx", "weight", "weight_packed", "weight_scale",
                         "weight_shape", "weight_zero_point", "input_scale"]),
        st.builds(
            lambda shape, dtype: torch.zeros(shape, dtype=dtype), st.lists(st.integers(0, 9), max_size=3),
            st.sampled_from([torch.int32, torch.float16, torch.int8, torch.uint8, torch.bool]),
        ),
    ),
    st.sampled_from(["gptq", "awq", "compressed-tensors"]), st.sampled_from([4, 8]), st.booleans(),
)  # fmt: skip
def test_any_tensors_of_a_linear_are_read_or_refused(parts: Any, method: str, bits: int, symmetric: bool) -> None:
    """Guards: tensors whose shapes nobody has checked."""
    from quant_layers.sources.importers import Scheme, is_quantized, read_linear

    if is_quantized(parts):
        answers(lambda: read_linear("up_proj", parts, Scheme(method, bits, symmetric, 0)))


def test_a_header_as_long_as_its_file_is_bounded_too(tmp_path: Path) -> None:
    """Guards: a MemoryError for a file without a byte in it on the disk, which is as long as its header claims."""
    file, length = tmp_path / "m.safetensors", _MAX_HEADER_BYTES + 8
    file.write_bytes(length.to_bytes(8, "little"))
    os.truncate(file, 8 + length)
    with file.open("rb", buffering=0) as stream, pytest.raises(StoreError, match=f"claims {length} bytes"):
        read_file(file, stream)
