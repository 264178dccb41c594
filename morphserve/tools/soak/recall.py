"""A model whose answers are known without running it, and are the same at every level.

Each token is a renamed one from `DISTANCE` tokens before: `t[p + 1] = RENAMED[t[p - DISTANCE]]`. Every layer carries it
a part of the way. Its attention looks at exactly one earlier position, by RoPE alone: queries and keys are the same at
every position, turned so that they match at one distance. What it finds there it writes beside what there is, and the
MLP copies that on to where the next layer reads. Tokens are orthogonal codes, so the right one leads by all there is.

Rows of weights have one step each, so that 8 and 4 bits hold them without loss, and roundings of activations are far
too small to matter: a layer that is only a little off is not seen. What is seen is a layer that is another's or
garbage, and KV that is another's: a block that was not copied, a table that was not rewritten, a prefix of another
prompt. Then the code that is carried is another token's.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OFFSETS = (3, 41, 17, 64)  # how far back each layer looks
DISTANCE = sum(OFFSETS)
_CODE = 64  # channels of a token's code
NUM_TOKENS = 2 * _CODE  # the rows of a Hadamard matrix, and their opposites
_HIDDEN, _INTERMEDIATE = 640, 256
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 64
_MATCH = 15.0  # of queries and keys: by e^30 the right position leads over its neighbours
_OPEN = 8.0  # of the gates: silu(8) = 8
_CONSTANT = _HIDDEN - _CODE  # a channel that is 1 at every position
MAX_LENGTH = 1024
RENAMED = tuple(random.Random(5).sample(range(NUM_TOKENS), NUM_TOKENS))


def answer(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return the tokens that follow a prompt.

    Args:
        prompt: longer than `DISTANCE`.
        num_tokens: of the answer.
    """
    assert len(prompt) > DISTANCE, f"a prompt of {len(prompt)} tokens says nothing, more than {DISTANCE} are needed"
    known = list(prompt)
    for _ in range(num_tokens):
        known.append(RENAMED[known[len(known) - 1 - DISTANCE]])
    return known[len(prompt) :]


def make_model(directory: Path) -> Path:
    """Write the model, with a tokenizer of a word for each token, and return its directory."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_config(), indent=1), encoding="utf-8")
    _write_tokenizer(directory)
    save_file(_weights(), directory / "model.safetensors", {"format": "pt"})
    return directory


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": NUM_TOKENS, "hidden_size": _HIDDEN, "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": len(OFFSETS), "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM, "max_position_embeddings": MAX_LENGTH, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def _write_tokenizer(directory: Path) -> None:
    vocabulary = {f"t{i}": i for i in range(NUM_TOKENS)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "eos_token": "t1", "bos_token": "t0"}
    (directory / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _weights() -> dict[str, Tensor]:
    """Return all tensors. Slots of `_CODE` channels: the token's own, then what each attention found and MLP copied."""
    import torch

    code = _codes()
    embedding = torch.zeros(NUM_TOKENS, _HIDDEN)
    embedding[:, :_CODE] = code
    embedding[:, _CONSTANT] = 1.0
    head = torch.zeros(NUM_TOKENS, _HIDDEN)
    last = 2 * len(OFFSETS)
    head[torch.tensor(RENAMED), last * _CODE : (last + 1) * _CODE] = code
    named = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": _norm(last + 1)}
    for layer, offset in enumerate(OFFSETS):
        for name, weight in {**_attention(2 * layer, offset), **_mlp(2 * layer + 1)}.items():
            named[f"model.layers.{layer}.{name}.weight"] = weight
    return {name: weight.to(torch.bfloat16).contiguous() for name, weight in named.items()}


def _codes() -> Tensor:
    """Return [NUM_TOKENS, _CODE] of 1 and -1, orthogonal or opposite."""
    import torch

    rows = torch.ones(1, 1)
    while len(rows) < _CODE:
        rows = torch.cat((torch.cat((rows, rows), 1), torch.cat((rows, -rows), 1)), 0)
    return torch.cat((rows, -rows), 0)


def _norm(num_slots: int) -> Tensor:
    """Return norm weights that leave codes of 1 as they are, with so many slots written."""
    import torch

    return torch.full((_HIDDEN,), math.sqrt((num_slots * _CODE + 1) / _HIDDEN))


def _attention(source: int, offset: int) -> dict[str, Tensor]:
    """Return an attention that looks `offset` back, at slot `source`, and writes the slot behind it."""
    import torch

    half = _HEAD_DIM // 2
    angles = torch.tensor([offset * 10000.0 ** (-i / half) for i in range(half)])
    query, key = torch.zeros(_HEADS, _HEAD_DIM, _HIDDEN), torch.zeros(_KV_HEADS, _HEAD_DIM, _HIDDEN)
    query[:, :half, _CONSTANT], query[:, half:, _CONSTANT] = angles.cos() * _MATCH, -angles.sin() * _MATCH
    key[:, :half, _CONSTANT] = _MATCH
    # A KV head carries half of the code twice, for the two query heads that read it.
    value, out = torch.zeros(_KV_HEADS, _HEAD_DIM, _HIDDEN), torch.zeros(_HIDDEN, _HEADS, _HEAD_DIM)
    share = _CODE // _KV_HEADS
    for i in range(_CODE):
        head, channel = divmod(i, share)
        for copy in range(_HEADS // _KV_HEADS):
            value[head, channel + copy * share, source * _CODE + i] = 1.0
            out[(source + 1) * _CODE + i, head * 2 + copy, channel + copy * share] = 0.5
    return {
        "input_layernorm": _norm(source + 1),
        "self_attn.q_proj": query.reshape(-1, _HIDDEN),
        "self_attn.k_proj": key.reshape(-1, _HIDDEN),
        "self_attn.v_proj": value.reshape(-1, _HIDDEN),
        "self_attn.o_proj": out.reshape(_HIDDEN, -1),
    }


def _mlp(source: int) -> dict[str, Tensor]:
    """Return an MLP that copies slot `source` to the slot behind it, in as many parts as there is room for."""
    import torch

    copies = _INTERMEDIATE // _CODE
    gate, up = torch.zeros(_INTERMEDIATE, _HIDDEN), torch.zeros(_INTERMEDIATE, _HIDDEN)
    down = torch.zeros(_HIDDEN, _INTERMEDIATE)
    gate[:, _CONSTANT] = _OPEN
    for i in range(_INTERMEDIATE):
        up[i, source * _CODE + i % _CODE] = 1.0
        down[(source + 1) * _CODE + i % _CODE, i] = 1 / (_OPEN * copies)
    return {
        "post_attention_layernorm": _norm(source + 1),
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": down,
    }
