"""Input scales for W8: nothing changes at full precision, much at eight bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_layers import QuantError, apply_scales, choose_scale, folds_of

pytestmark = pytest.mark.cpu

HIDDEN, INNER = 32, 48


def layer(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Linears and norms of a small Llama layer, fp32 so that only mistakes make a difference."""
    make = torch.Generator().manual_seed(seed)
    shapes = {
        "self_attn.qkv_proj": (96, HIDDEN),
        "mlp.gate_up_proj": (2 * INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    weights = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    norms = {n: torch.randn(HIDDEN, generator=make) for n in ("input_layernorm", "post_attention_layernorm")}
    return weights, norms


def run(x: Tensor, weights: dict[str, Tensor], norms: dict[str, Tensor], offset: float) -> tuple[Tensor, Tensor]:
    """What reaches the attention, and what the MLP gives."""

    def normed(name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (norms[name] + offset)

    gate, up = (normed("post_attention_layernorm") @ weights["mlp.gate_up_proj"].t()).chunk(2, dim=-1)
    down = (torch.nn.functional.silu(gate) * up) @ weights["mlp.down_proj"].t()
    return normed("input_layernorm") @ weights["self_attn.qkv_proj"].t(), down


@given(st.integers(0, 99), st.sampled_from([0.0, 1.0]), st.sets(st.sampled_from(["q", "g", "d"])))
@settings(deadline=None)
def test_a_scaled_layer_computes_the_same(seed: int, offset: float, which: set[str]) -> None:
    """Guards: a scale divided out on one side only, in the gate's rows, or twice."""
    weights, norms = layer(seed)
    make = torch.Generator().manual_seed(seed)
    names = {"q": "self_attn.qkv_proj", "g": "mlp.gate_up_proj", "d": "mlp.down_proj"}
    scales = {names[w]: torch.rand(weights[names[w]].shape[1], generator=make) * 4 + 0.1 for w in which}
    new, changed = apply_scales(weights, norms, offset, scales)
    assert set(changed) == {n for w, n in (("q", "input_layernorm"), ("g", "post_attention_layernorm")) if w in which}
    x = torch.randn(5, HIDDEN, generator=make)
    for old, now in zip(run(x, weights, norms, offset), run(x, new, {**norms, **changed}, offset), strict=True):
        torch.testing.assert_close(now, old, rtol=2e-4, atol=2e-3)


def test_rounding_of_the_norm_is_made_good_in_the_weight() -> None:
    """Guards: a norm in bf16 divides by something else than the columns are multiplied by."""
    weights, norms = layer(1)
    norms = {name: norm.bfloat16() for name, norm in norms.items()}
    norms["input_layernorm"][3] = 0
    new, changed = apply_scales(weights, norms, 0.0, {"self_attn.qkv_proj": torch.linspace(0.3, 7, HIDDEN)})
    norm = changed["input_layernorm"]
    assert norm.dtype == torch.bfloat16
    kept = norms["input_layernorm"].float() * weights["self_attn.qkv_proj"]
    torch.testing.assert_close(norm.float() * new["self_attn.qkv_proj"], kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ({"self_attn.o_proj": torch.ones(HIDDEN)}, "no way to scale the inputs of ['self_attn.o_proj']"),
        ({"mlp.down_proj": torch.ones(INNER + 1)}, f"scale of mlp.down_proj is ({INNER + 1},)"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scales: dict[str, Tensor], words: str) -> None:
    """Guards: another model's scales, folded in as far as they happen to fit."""
    with pytest.raises(QuantError, match="known are|channels") as caught:
        apply_scales(*layer(2), 0.0, scales)
    assert words in str(caught.value)


def test_an_outlier_channel_is_tamed() -> None:
    """Guards: scales that do not help, or are searched for against the wrong error."""
    make = torch.Generator().manual_seed(5)
    x, weight = torch.randn(64, HIDDEN, generator=make), torch.randn(24, HIDDEN, generator=make)
    x[:, 7] *= 60
    scale = choose_scale(x, weight)
    assert scale.values[7] == scale.values.max() and scale.exponent > 0
    assert scale.error < 0.2 * scale.error_plain


@given(st.integers(0, 50), st.floats(0.0, 3.0))
@settings(deadline=None, max_examples=25)
def test_scaling_is_never_worse_than_none(seed: int, spread: float) -> None:
    """Guards: a fixed exponent, where leaving the linear alone was best."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(32, HIDDEN, generator=make) * torch.exp(spread * torch.randn(HIDDEN, generator=make))
    x[0] = 0  # a token of zeros has no power to compare with
    scale = choose_scale(x, torch.randn(16, HIDDEN, generator=make))
    assert scale.error <= scale.error_plain
    assert torch.isfinite(scale.values).all() and (scale.values > 0).all()


def test_one_norm_is_taken_where_a_family_has_two() -> None:
    """Guards: Gemma's post-attention norm, which feeds the residual and not the MLP."""
    names = {"mlp.gate_up_proj", "mlp.down_proj", "post_attention_layernorm", "pre_feedforward_layernorm"}
    folds = {fold.consumer: fold.producer for fold in folds_of(names)}
    assert folds == {"mlp.gate_up_proj": "pre_feedforward_layernorm", "mlp.down_proj": "mlp.gate_up_proj"}
    assert folds_of({"self_attn.o_proj"}) == ()
