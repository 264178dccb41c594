"""Quantized checkpoints of a small base model, written in the layouts of the tools that users have.

Integers are packed by vLLM's and compressed-tensors' own helpers, so that nothing here shares a line with what
is under test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_layers import QuantW4, quantize_w4, quantize_w8

KINDS = ("gptq", "gptq_asym", "gptq_v2_asym", "awq", "ct_w4_sym", "ct_w4_asym", "ct_w8", "ct_int8")
# To serve as they are: a scale for every row, or one for a whole weight; activations by token, or as calibrated.
BASES = ("ct_int8", "ct_int8_asym", "ct_int8_tensor", "ct_int8_static", "ct_fp8", "ct_fp8_tensor", "ct_fp8_static")
_FOLDS = {  # AWQ: what reads a norm, by the norm
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def write_checkpoint(base: Path, out: Path, kind: str, group_size: int) -> Path:
    """Quantize every decoder linear of `base` into `out`, which must not exist."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(base.glob("*.safetensors")):
        tensors |= load_file(file)
    if kind == "awq":
        _fold(tensors)
    written = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.endswith("_proj.weight") and ".layers." in name)
    }
    for name, weight in tensors.items():
        if name not in written:
            module = name.removesuffix(".weight")
            written |= {f"{module}.{part}": t.contiguous() for part, t in _packed(weight, kind, group_size)}
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(written, out / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    quantization = quantization_config(kind, group_size)
    if kind == "gptq":  # as AutoGPTQ left it, in a file of its own
        (out / "quantize_config.json").write_text(json.dumps(quantization))
    config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config))
    return out


def quantization_config(kind: str, group_size: int) -> dict[str, Any]:
    if kind.startswith("gptq"):
        version = "gptq_v2" if "v2" in kind else "gptq"
        return {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False,
                "sym": "asym" not in kind, "checkpoint_format": version, "lm_head": False}  # fmt: skip
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    if kind in BASES:
        return _config_of_base(kind)
    weights = {
        "num_bits": 4 if "w4" in kind else 8, "type": "int", "symmetric": "asym" not in kind, "dynamic": False,
        "strategy": "group" if "w4" in kind else "channel", "group_size": group_size if "w4" in kind else None,
    }  # fmt: skip
    return _compressed_tensors("pack-quantized", weights, None)


def _config_of_base(kind: str) -> dict[str, Any]:
    kinds = {"num_bits": 8, "type": "float" if "fp8" in kind else "int"}
    static, one_scale = "static" in kind, "static" in kind or "tensor" in kind
    weights = {**kinds, "symmetric": True, "dynamic": False, "strategy": "tensor" if one_scale else "channel"}
    activations = {
        **kinds, "symmetric": "asym" not in kind, "dynamic": not static, "strategy": "tensor" if static else "token",
    }  # fmt: skip
    return _compressed_tensors("float-quantized" if "fp8" in kind else "int-quantized", weights, activations)


def _compressed_tensors(format: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _fold(tensors: dict[str, Tensor]) -> None:
    """Scale columns up and the norm before them down, as AWQ does."""
    torch.manual_seed(1)
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        prefix, norm = name.removesuffix(".weight").rsplit(".", 1)
        scale = 2.0 ** torch.randint(-1, 2, tensors[name].shape)  # exact in bf16
        tensors[name] = tensors[name] / scale.to(tensors[name].dtype)
        for consumer in (f"{prefix}.{name}.weight" for name in _FOLDS[norm]):
            if consumer in tensors:
                tensors[consumer] = tensors[consumer] * scale.to(tensors[consumer].dtype)


def _packed(weight: Tensor, kind: str, group_size: int) -> Iterator[tuple[str, Tensor]]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack, pack_cols

    n, k = weight.shape
    if kind in BASES:
        yield from _base_parts(weight, kind)
        return
    if kind == "ct_w8":
        eight = quantize_w8(weight)
        yield "weight_scale", eight.scale[:, None].to(torch.bfloat16)
        yield "weight_packed", pack_to_int32(eight.q, 8)
        yield "weight_shape", torch.tensor([n, k])
        return
    symmetric = "asym" not in kind and kind != "awq"
    dtype = torch.bfloat16 if kind.startswith("ct") else torch.float16
    quant: QuantW4 = quantize_w4(weight, group_size, symmetric=symmetric, scale_dtype=dtype)
    q, zero, groups = quant.q.int(), quant.zero.int(), k // group_size
    if kind.startswith("gptq"):
        stored = zero if "v2" in kind else (zero - 1) & 15
        yield "qweight", gptq_pack(q.t().contiguous(), 4, k, n)
        yield "qzeros", pack_cols(stored.t().contiguous(), 4, groups, n)
        yield "scales", quant.scale.t()
        yield "g_idx", (torch.arange(k) // group_size).int()
    elif kind == "awq":
        yield "qweight", awq_pack(q.t().contiguous(), 4, k, n)
        yield "qzeros", awq_pack(zero.t().contiguous(), 4, groups, n)
        yield "scales", quant.scale.t()
    else:
        yield "weight_packed", pack_to_int32((q - 8).to(torch.int8), 4)
        yield "weight_scale", quant.scale
        yield "weight_shape", torch.tensor([n, k])
        if not symmetric:
            yield "weight_zero_point", pack_to_int32((zero - 8).to(torch.int8), 4, packed_dim=0)


def _base_parts(weight: Tensor, kind: str) -> Iterator[tuple[str, Tensor]]:
    dtype, largest = (torch.float8_e4m3fn, 448.0) if "fp8" in kind else (torch.int8, 127.0)
    peaks = weight.float().abs().amax(dim=1, keepdim=True)
    scale = (peaks.max().reshape(1) if "tensor" in kind or "static" in kind else peaks) / largest
    steps = weight.float() / scale
    yield "weight", steps.to(dtype) if "fp8" in kind else steps.round().to(dtype)
    yield "weight_scale", scale
    if "static" in kind:
        yield "input_scale", torch.full((1,), 8.0 / largest)


def first_layers(model: Path, out: Path, num_layers: int) -> Path:
    """The first decoder layers of a Llama in safetensors, with all the rest of its directory."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    kept: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            _, is_layer, rest = name.partition(".layers.")
            if not is_layer or int(rest.split(".")[0]) < num_layers:
                kept[name] = tensor
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    return out
