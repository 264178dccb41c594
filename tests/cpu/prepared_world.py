"""A model of a few tensors, and a store with what was prepared for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from morphserve.prepared import Place, ProfileKey, Store, weights_fingerprint
from policies import LayerMove, StepTime, StepTimes
from quant_layers import ProfileLevel, write_profile

NUM_LAYERS = 2
PLACE = Place("AMD EPYC", "bf16", "2", "bfloat16", 1, 1, True, "0.32.0")
KEY = ProfileKey(("w8", "w4"), "bfloat16", "bf16")
TIMES = StepTimes({fmt: StepTime(0.01, 1e-4, 1e-4, 1e-6) for fmt in ("base", "w8", "w4")}, LayerMove(0.001, 0.001))


def make_model(directory: Path, seed: int = 0, splits: int = 1) -> Path:
    """A directory with config.json and safetensors, in one file or in several."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{layer}.{name}": torch.randn(*shape, generator=generator)
        for layer in range(NUM_LAYERS)
        for name, shape in (("input_layernorm.weight", (64,)), ("mlp.down_proj.weight", (256, 192)))
    }
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": NUM_LAYERS, "hidden_size": 64}))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        files.setdefault(f"model-{number % splits}.safetensors", {})[name] = tensor
    for file, part in files.items():
        save_file(part, directory / file)
    if splits > 1:
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def store_of(model: Path, cache: Path, shipped: Path = Path("/nowhere")) -> Store:
    """The store of a model, without what comes with the package."""
    weights = weights_fingerprint(model)
    assert weights is not None
    return Store(cache, weights, shipped)


def keep_profile(
    store: Store, key: ProfileKey = KEY, *, int8: bool = True, when: str = "2026-01-02", **more: object
) -> Path:
    """Put a profile there as `morphserve prepare` does."""
    directory = store.profile_at(key)
    directory.parent.mkdir(parents=True, exist_ok=True)
    said = {
        "weights": store.weights, "formats": list(key.formats), "dtype": key.dtype, "tier": key.tier,
        "sources": dict(key.sources), "int8_activations": int8, "when": when, **more,
    }  # fmt: skip
    ladder = (ProfileLevel({}, 0.0), ProfileLevel({1: "w8"}, 0.01), ProfileLevel({0: "w8", 1: "w8"}, 0.02))
    scales = {0: {"mlp.down_proj": torch.ones(192)}}
    write_profile(directory, "f" * 64, scales, ladder, (1, 0), said, {})
    return directory


def keep_times(store: Store, place: Place = PLACE, when: str = "2026-01-02") -> Path:
    """Put step times there."""
    return store.keep_times(TIMES.document(), place, when)
