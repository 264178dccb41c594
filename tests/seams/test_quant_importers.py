"""Every layout that users have comes back as the integers that were put in. Packed by vLLM's own helpers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import KINDS, quantization_config, write_checkpoint
from safetensors.torch import load_file, save_file

from quant_layers import (
    Checkpoint,
    CheckpointError,
    QuantW4,
    QuantW8,
    quantize_w4,
    quantize_w8,
)

Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model of one decoder layer, as a file: weights and no code."""
    directory = tmp_path / "base"
    directory.mkdir()
    torch.manual_seed(0)
    shapes = {"self_attn.q_proj": (64, 128), "self_attn.k_proj": (32, 128), "mlp.down_proj": (128, 256)}
    tensors = {f"model.layers.0.{name}.weight": torch.randn(n, k).bfloat16() for name, (n, k) in shapes.items()}
    tensors["model.layers.0.input_layernorm.weight"] = torch.rand(128).bfloat16() + 0.5
    tensors["model.norm.weight"] = torch.rand(128).bfloat16()
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.rand(64).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 128}))
    return directory


def edit(checkpoint: Path, change: Any) -> None:
    """Rewrite the tensors as `change` leaves them."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_integers_come_back(base: Path, tmp_path: Path, kind: str) -> None:
    """Guards: nibbles in another order, zero points off by one, rows and columns exchanged."""
    checkpoint = Checkpoint.open(write_checkpoint(base, tmp_path / kind, kind, 64))
    layer = checkpoint.layer(0)
    weights = load_file(base / "model.safetensors")
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    assert set(layer.linears) == {f"model.layers.0.{name}" for name in names}
    for name, quant in layer.linears.items():
        weight = weights[f"{name}.weight"]
        if kind == "awq":  # folded with the norm in front: looked at below
            continue
        if isinstance(quant, QuantW8):
            expected = quantize_w8(weight)
            assert torch.equal(quant.q, expected.q)
            torch.testing.assert_close(quant.scale, expected.scale, rtol=0.01, atol=0)
        else:
            dtype = torch.bfloat16 if kind.startswith("ct") else torch.float16
            four = quantize_w4(weight, 64, symmetric="asym" not in kind, scale_dtype=dtype)
            assert torch.equal(quant.q, four.q) and torch.equal(quant.zero, four.zero)
            assert torch.equal(quant.scale, four.scale)
    norms = {name: tensor for name, tensor in layer.others.items() if "norm" in name}
    assert set(norms) == {"model.layers.0.input_layernorm.weight"}
    assert torch.equal(layer.others[f"{Q}.bias"], weights[f"{Q}.bias"])
    assert dict(checkpoint.outside()).keys() == {"model.norm.weight"}


def test_awq_means_the_same_with_its_norms(base: Path, tmp_path: Path) -> None:
    """Guards: the linears of AWQ taken without the norms that belong to them."""
    layer = Checkpoint.open(write_checkpoint(base, tmp_path / "awq", "awq", 32)).layer(0)
    weights = load_file(base / "model.safetensors")
    name, norm = "model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm.weight"
    quant = layer.linears[name]
    assert isinstance(quant, QuantW4)
    exact = weights[f"{name}.weight"].float() * weights[norm].float()
    with_norm = quant.dequantize() * layer.others[norm].float()
    alone = quant.dequantize() * weights[norm].float()
    assert float((with_norm - exact).norm() / exact.norm()) < 0.2
    assert float((alone - exact).norm() / exact.norm()) > 0.4


def test_wide_and_narrow_grids_dequantize_alike(base: Path, tmp_path: Path) -> None:
    """Guards: a reader that is right about integers and wrong about what they mean."""
    weights = load_file(base / "model.safetensors")
    for kind, limit in (("gptq", 0.12), ("gptq_v2_asym", 0.1), ("ct_w4_asym", 0.1), ("ct_w8", 0.01), ("ct_int8", 0.01)):
        layer = Checkpoint.open(write_checkpoint(base, tmp_path / kind, kind, 32)).layer(0)
        for name, quant in layer.linears.items():
            meaning = quant.dequantize()
            exact = weights[f"{name}.weight"].float()
            assert float((meaning - exact).norm() / exact.norm()) < limit, (kind, name)


def scatter(tensors: Tensors) -> None:
    tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"].flip(0)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("gptq", scatter, "activation order .*desc_act"),
        ("gptq", lambda t: t.pop(f"{Q}.scales"), "lacks 'scales'"),
        ("gptq", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :8].contiguous()}), "do not go together"),
        ("ct_w4_sym", lambda t: t.update({f"{Q}.weight_shape": torch.tensor([64, 100])}), "known are 4 and 8"),
        ("ct_int8", lambda t: t.update({f"{Q}.input_scale": torch.ones(1)}), "activation scales"),
        ("ct_int8", lambda t: t.update({f"{Q}.weight_zero_point": torch.ones(64, 1, dtype=torch.int8)}), "zero points"),
        ("ct_int8", lambda t: t.update({f"{Q}.weight_scale": torch.ones(64, 4)}), "256 scales for 64 rows"),
        ("ct_int8", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)}), "float8"),
    ],
)
def test_what_cannot_be_read_is_refused(base: Path, tmp_path: Path, kind: str, change: Any, words: str) -> None:
    """Guards: a checkpoint that is silently misread."""
    checkpoint = write_checkpoint(base, tmp_path / kind, kind, 64)
    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(checkpoint).layer(0)
    assert "q_proj" in str(caught.value)


def test_trivial_order_is_accepted_although_desc_act_says_so(base: Path, tmp_path: Path) -> None:
    """Guards: a refusal by a flag, where the tensors are in order (static act-order)."""
    checkpoint = write_checkpoint(base, tmp_path / "gptq", "gptq", 64)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(checkpoint).layer(0).linears


def test_autogptq_config_in_a_file_of_its_own(base: Path, tmp_path: Path) -> None:
    """Guards: older checkpoints, whose config.json says nothing."""
    checkpoint = write_checkpoint(base, tmp_path / "gptq", "gptq", 64)
    expected = Checkpoint.open(checkpoint).layer(0).linears[Q]
    config = json.loads((checkpoint / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "quantize_config.json").write_text(json.dumps(quantization))
    found = Checkpoint.open(checkpoint).layer(0).linears[Q]
    assert torch.equal(found.q, expected.q)


def set_config(checkpoint: Path, **values: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= values
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("gptq", {"bits": 3}, "gptq with 3 bits"),
        ("gptq", {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not known"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin' is not known"),
        ("awq", {"version": "gemv"}, "'gemv' is not known"),
    ],
)
def test_schemes_that_are_not_known(base: Path, tmp_path: Path, kind: str, values: Any, words: str) -> None:
    """Guards: an unknown layout read as a known one."""
    checkpoint = write_checkpoint(base, tmp_path / kind, kind, 64)
    set_config(checkpoint, **values)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(checkpoint)


def test_files_that_are_damaged_or_not_there(base: Path, tmp_path: Path) -> None:
    """Guards: an error from deep inside a library, without the file's name."""
    with pytest.raises(CheckpointError, match="no quantization_config"):
        Checkpoint.open(base)
    checkpoint = write_checkpoint(base, tmp_path / "gptq", "gptq", 64)
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        Checkpoint.open(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors"):
        Checkpoint.open(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks part-2.safetensors, which its index names"):
        Checkpoint.open(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is no JSON"):
        Checkpoint.open(checkpoint)
    with pytest.raises(CheckpointError, match="config.json: No such file"):
        Checkpoint.open(tmp_path / "nothing")


def test_another_models_shape_is_refused(base: Path, tmp_path: Path) -> None:
    """Guards: a checkpoint of a bigger sister model."""
    checkpoint = Checkpoint.open(write_checkpoint(base, tmp_path / "gptq", "gptq", 64))
    checkpoint.check_shape({"hidden_size": 128, "model_type": "llama"})
    with pytest.raises(CheckpointError, match="hidden_size 128 instead of 256"):
        checkpoint.check_shape({"hidden_size": 256, "model_type": "llama"})


def test_a_quantized_head_is_refused(base: Path, tmp_path: Path) -> None:
    """Guards: a head that is never swapped counted as swapped."""
    checkpoint = write_checkpoint(base, tmp_path / "gptq", "gptq", 64)
    edit(checkpoint, lambda t: t.update({"lm_head.qweight": torch.zeros(8, 8, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match="quantized lm_head, outside the decoder layers"):
        dict(Checkpoint.open(checkpoint).outside())


def test_the_digest_follows_the_files(base: Path, tmp_path: Path) -> None:
    """Guards: packed layers of an older checkpoint served after it was replaced."""
    checkpoint = write_checkpoint(base, tmp_path / "gptq", "gptq", 64)
    first = Checkpoint.open(checkpoint).digest
    assert Checkpoint.open(checkpoint).digest == first
    edit(checkpoint, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 2}))
    assert Checkpoint.open(checkpoint).digest != first
    assert quantization_config("gptq", 64)["sym"]
