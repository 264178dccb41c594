"""Calibration layer by layer sees what a whole forward pass sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from morphserve.errors import ProfilingError
from morphserve.profiling import Calibration, decoder_layers, norms_of, smooth_model, token_windows
from morphserve.profiling.smoothing import fused_linears
from quant_layers import choose_scale

pytestmark = pytest.mark.cpu

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3")


def tiny(family: str) -> torch.nn.Module:
    """Three random layers of a family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_inputs_are_those_of_a_whole_pass(family: str) -> None:
    """Guards: a mask, a rotary table or a residual lost between two layers."""
    model, windows = tiny(family), torch.randint(3, 64, (2, 10))
    layers = decoder_layers(model)
    watched = [{name: parts[0] for name, parts in fused_linears(layer).items()} for layer in layers]
    whole: list[dict[str, list[torch.Tensor]]] = [{name: [] for name in row} for row in watched]
    handles = [
        linear.register_forward_pre_hook(lambda _, args, to=whole[i][name]: to.append(args[0].flatten(0, -2)))
        for i, row in enumerate(watched)
        for name, linear in row.items()
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    calibration = Calibration.begin(model, windows)
    for i, layer in enumerate(layers):
        for name, inputs in calibration.pass_through(layer, watched[i]).items():
            torch.testing.assert_close(inputs, torch.cat(whole[i][name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scaled_in_three_places(family: str) -> None:
    """Guards: a family whose names are missed, so that nothing is gained and nobody is told."""
    model, told = tiny(family), []
    scales = smooth_model(model, torch.randint(3, 64, (2, 10)), lambda layer, _: told.append(layer))
    assert told == [0, 1, 2]
    for row in scales.values():
        assert {name: len(s.values) for name, s in row.items()} == {
            "self_attn.qkv_proj": 32, "mlp.gate_up_proj": 32, "mlp.down_proj": 48,
        }  # fmt: skip


def test_the_scale_is_made_for_all_that_read_the_input() -> None:
    """Guards: scales fitted to q alone, folded into k and v too."""
    model, windows = tiny("llama"), torch.randint(3, 64, (2, 10))
    first = decoder_layers(model)[0]
    with torch.no_grad():
        inputs = Calibration.begin(model, windows).pass_through(first, {"q": first.self_attn.q_proj})["q"]
    attention = first.self_attn
    weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
    found = smooth_model(model, windows, lambda *_: None)[0]["self_attn.qkv_proj"]
    assert torch.equal(found.values, choose_scale(inputs, weight).values)


def test_norm_names_are_those_below_the_layers() -> None:
    """Guards: a fingerprint that vLLM's names can never match."""
    names = {name for name, _ in norms_of(decoder_layers(tiny("qwen3")))}
    assert {"0.input_layernorm.weight", "2.post_attention_layernorm.weight", "1.self_attn.q_norm.weight"} <= names


def test_what_cannot_be_profiled_is_refused(tmp_path: Path) -> None:
    """Guards: an attribute error from deep inside another library."""
    with pytest.raises(ProfilingError, match="no decoder layers"):
        decoder_layers(torch.nn.Linear(2, 2))
    text = tmp_path / "short.txt"
    text.write_text("a few words")

    class Words:
        def encode(self, text: str) -> list[int]:
            return [len(word) for word in text.split()]

    assert token_windows(Words(), [text], 1, 3).tolist() == [[1, 3, 5]]
    with pytest.raises(ProfilingError, match="has 3 tokens, 2 windows of 4 need 8"):
        token_windows(Words(), [text], 2, 4)
