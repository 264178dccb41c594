"""Orders and ladders, against counting it out."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant_layers import (
    Change,
    QuadraticCost,
    greedy,
    half_of,
    join_format,
    layer_importance_order,
    split_format,
)

pytestmark = pytest.mark.cpu

SIZES = {"base": 100, "w8": 50, "w4": 30}


def slopes(seed: int, num_layers: int = 4) -> dict[Change, torch.Tensor]:
    """Random ones; w4 hurts more, and a layer's two formats hurt in related ways."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(num_layers):
        own = torch.randn(200, generator=generator) * (0.05 + 0.1 * layer)
        found[Change(layer, "w8")] = 0.2 * own + 0.01 * torch.randn(200, generator=generator)
        found[Change(layer, "w4")] = own
    return found


def test_cost_of_a_set_is_half_the_mean_square_of_the_sum() -> None:
    """Guards: effects of layers that are added although they cancel, or the other way round."""
    rows = slopes(0)
    cost = QuadraticCost.of_slopes(rows)
    for chosen in combinations(rows, 3):
        expected = float(sum(rows[c].double() for c in chosen).square().mean() / 2)  # type: ignore[union-attr]
        assert cost.kl(chosen) == pytest.approx(expected, rel=1e-9)
    opposite = {Change(0, "w8"): torch.ones(10), Change(1, "w8"): -torch.ones(10)}
    assert QuadraticCost.of_slopes(opposite).kl(list(opposite)) == 0.0


@given(st.integers(0, 50))
def test_every_move_is_the_best_one(seed: int) -> None:
    """Guards: prices that are not looked at again after a move, and a layer counted in two formats."""
    rows = slopes(seed)
    cost = QuadraticCost.of_slopes(rows)
    moves = greedy(cost, lambda _, fmt: SIZES[fmt])
    state: dict[int, Change] = {}

    def freed(now: dict[int, Change]) -> int:
        return sum(100 - SIZES[c.format] for c in now.values())

    for move in moves:
        options = [
            c for c in rows
            if SIZES[c.format] < (SIZES[state[c.layer].format] if c.layer in state else 100)
        ]  # fmt: skip
        rates = {
            c: (freed({**state, c.layer: c}) - freed(state))
            / max(cost.kl([*{**state, c.layer: c}.values()]) - cost.kl([*state.values()]), 1e-9)
            for c in options
        }
        assert rates[move.change] == pytest.approx(max(rates.values()), rel=1e-6)
        state[move.change.layer] = move.change
        assert move.bytes_freed == freed(state)
        assert move.expected_kl == pytest.approx(cost.kl([*state.values()]), rel=1e-9, abs=1e-15)
    assert [c.format for c in state.values()] == ["w4"] * 4, "all the way down"


def test_algorithm_1_by_hand() -> None:
    """Guards: the weights of the paper, its 'high means safe', or MDS that is not taken anew after each layer."""
    asked: list[tuple[tuple[int, ...], int]] = []

    def degradation(taken: tuple[int, ...], layer: int) -> float:
        asked.append((taken, layer))
        return {(): [0.9, 0.5, 0.7], (0,): [0.0, 0.9, 0.1], (0, 1): [0.0, 0.0, 0.3]}[taken][layer]

    # Round 1: .25 * .4 + .25 * .2 + .5 * .9 = .6 before .575 and .55; round 2: .75 before .275.
    assert layer_importance_order([0.4, 0.8, 0.5], [0.2, 0.4, 0.4], degradation) == [0, 1, 2]
    assert asked == [((), 0), ((), 1), ((), 2), ((0,), 1), ((0,), 2), ((0, 1), 2)]
    assert layer_importance_order([0.0, 1.0], [0.0, 0.0], lambda *_: 0.0) == [1, 0]
    assert layer_importance_order([0.0, 0.0], [0.0, 1.0], lambda *_: 0.0) == [1, 0]


def test_halves_are_changed_one_by_one() -> None:
    """Guards: one half's format that undoes the other's."""
    rows = {
        Change(0, "w8", "attention"): torch.tensor([0.1, 0.0]),
        Change(0, "w8", "mlp"): torch.tensor([0.0, 0.3]),
        Change(0, "w4", "mlp"): torch.tensor([0.0, 1.0]),
    }
    sizes = {"attention": {"base": 20, "w8": 10}, "mlp": {"base": 80, "w8": 40, "w4": 20}}
    moves = greedy(QuadraticCost.of_slopes(rows), lambda unit, fmt: sizes[unit[1]][fmt])
    assert [(m.change.half, m.change.format) for m in moves] == [("attention", "w8"), ("mlp", "w8"), ("mlp", "w4")]
    assert [m.bytes_freed for m in moves] == [10, 50, 70]
    assert moves[-1].expected_kl == pytest.approx((0.01 + 1.0) / 4)


def test_formats_of_halves() -> None:
    """Guards: attention and MLP exchanged."""
    assert split_format("w8") == ("w8", "w8") and split_format("w8/base") == ("w8", "base")
    assert join_format("w4", "w4") == "w4" and join_format("base", "w4") == "base/w4"
    names = ("self_attn.qkv_proj", "input_layernorm", "mlp.down_proj", "post_attention_layernorm")
    assert [half_of(name) for name in names] == ["attention", "attention", "mlp", "mlp"]
