"""A LoRA adapter for any Llama-like model, of random numbers: something to load."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

_RANK = 8


def write_adapter(model: Path, directory: Path, seed: int) -> Path:
    """Write an adapter of the query projections in every layer, and return its directory."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rows = heads * (config.get("head_dim") or hidden // heads)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        shapes |= {f"{prefix}.lora_A.weight": (_RANK, hidden), f"{prefix}.lora_B.weight": (rows, _RANK)}
    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(directory / "adapter_model.safetensors", shapes, random.Random(seed))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": 2 * _RANK, "bias": "none",
        "target_modules": ["q_proj"], "base_model_name_or_path": str(model),
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def _write_tensors(path: Path, shapes: dict[str, tuple[int, int]], draw: random.Random) -> None:
    """Write a safetensors file of float32; this room loads no torch."""
    header, content = {}, bytearray()
    for name, (rows, columns) in shapes.items():
        begin = len(content)
        content += struct.pack(f"<{rows * columns}f", *(draw.gauss(0.0, 0.05) for _ in range(rows * columns)))
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, len(content)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
