"""A streamed model computes what the whole model computes, and its prices are what swapping really costs."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from morphserve.errors import ConfigError, ProfilingError
from morphserve.tools.profile import (
    ProfileJob,
    StreamedModel,
    Workspace,
    cost_of,
    lis_order,
    run_profile,
    swap_order,
    token_windows,
)
from morphserve.tools.profile.effects import backward_sweep, forward_sweep
from morphserve.tools.profile.text import decoder_layers
from morphserve.tools.profile.variants import RoundToNearest, parts_of
from quant_layers import HALVES, Change, Move, choose_scale

pytestmark = pytest.mark.cpu

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3")
Tiny = tuple[torch.nn.Module, Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three random layers of a family: the model, and the directory it was saved to."""
    made: dict[str, Tiny] = {}

    def make(family: str) -> Tiny:
        if family not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                family, vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=8, initializer_range=0.1,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
            directory = tmp_path_factory.mktemp(family)
            model.save_pretrained(directory)
            made[family] = model, directory
        return made[family]

    return make


def swept(model: StreamedModel, workspace: Workspace, draws: int = 2) -> Any:
    """Arguments, scales and effects of two windows."""
    torch.manual_seed(1)
    windows = torch.randint(3, 64, (2, 24))
    arguments = forward_sweep(model, windows, workspace)
    scales = {i: {k: s.values for k, s in workspace.load("scales", i).items()} for i in range(len(model))}
    variants = [RoundToNearest("w8", scales), RoundToNearest("w4")]
    return windows, scales, backward_sweep(model, variants, arguments, workspace, draws, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_the_whole_model(tiny: Any, family: str) -> None:
    """Guards: a mask, a rotary table, a residual or a soft cap lost on the way; layers that attend differently."""
    whole, directory = tiny(family)
    model, windows = StreamedModel(directory), torch.randint(3, 64, (2, 24))
    hidden, arguments = model.begin(windows)
    for window, states in enumerate(hidden):
        for index in range(len(model)):
            states = model.run(index, model.layer(index), states, arguments[index][window])
        expected = whole(windows[window : window + 1]).logits[0]
        torch.testing.assert_close(model.logits(states), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_changes_nothing_at_full_precision(tiny: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: scales folded in on one side only, or into the wrong norm of a family."""
    from morphserve.tools.profile import variants as module

    _, directory = tiny(family)
    model = StreamedModel(directory)
    windows = torch.randint(3, 64, (2, 24))
    hidden, arguments = model.begin(windows)
    exact_w8 = SimpleNamespace(
        of=lambda weight: SimpleNamespace(dequantize=lambda: weight), per_row=True, int8_activations=True
    )
    monkeypatch.setattr(module, "FORMATS", {"w8": exact_w8})
    monkeypatch.setattr(module, "round_activations", lambda x: x)
    sizes = {"self_attn.qkv_proj": 64, "mlp.gate_up_proj": 64, "mlp.down_proj": 96}
    scales = {0: {name: 2.0 ** torch.randint(-2, 3, (size,)) for name, size in sizes.items()}}
    exact = model.run(0, model.layer(0), hidden[0], arguments[0][0])
    scaled = RoundToNearest("w8", scales).run(model, 0, model.layer(0), hidden[0], arguments[0][0])
    torch.testing.assert_close(scaled, exact, rtol=1e-4, atol=1e-5)


def divergence(whole: torch.nn.Module, model: StreamedModel, windows: torch.Tensor, changes: list[Change],
               variants: dict[str, RoundToNearest]) -> float:  # fmt: skip
    """The true KL of a set of changes, nats per token."""
    total = 0.0
    hidden, arguments = model.begin(windows)
    formats = {change.layer: change.format for change in changes}
    for window, states in enumerate(hidden):
        with torch.no_grad():
            for index in range(len(model)):
                tensors, kwargs = model.layer(index), arguments[index][window]
                if index in formats:
                    states = variants[formats[index]].run(model, index, tensors, states, kwargs)
                else:
                    states = model.run(index, tensors, states, kwargs)
            found = model.logits(states).log_softmax(-1)
            exact = whole(windows[window : window + 1]).logits[0].log_softmax(-1)
        total += float((exact.exp() * (exact - found)).sum(-1).mean())
    return total / len(windows)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_prices_are_what_swapping_costs(tiny: Any, tmp_path: Path, family: str) -> None:
    """Guards: gradients and changes of different layers, windows or draws put together."""
    whole, directory = tiny(family)
    model = StreamedModel(directory)
    windows, scales, effects = swept(model, Workspace(tmp_path / "work", {}), draws=64)
    cost = cost_of(effects)
    variants = {"w8": RoundToNearest("w8", scales), "w4": RoundToNearest("w4")}
    for changes in ([Change(0, "w8")], [Change(1, "w4")], [Change(2, "w4")], [Change(i, "w8") for i in range(3)]):
        true = divergence(whole, model, windows, changes, variants)
        assert cost.kl(changes) == pytest.approx(true, rel=0.35), changes


def test_slopes_are_of_their_own_window(tiny: Any, tmp_path: Path) -> None:
    """Guards: the gradient of one text with the change of another, which no mean would show."""
    from morphserve.tools.profile.effects import _gradients_of_answers

    model = StreamedModel(tiny("llama")[1])
    workspace = Workspace(tmp_path / "work", {})
    windows, _, effects = swept(model, workspace)
    gradient = _gradients_of_answers(model, workspace.load("hidden", 3), 2, 0)
    states, (_, arguments) = workspace.load("hidden", 2), model.begin(windows)
    expected = []
    for window, kwargs in enumerate(arguments[2]):
        before, tensors = states[window : window + 1], model.layer(2)
        change = RoundToNearest("w4").run(model, 2, tensors, before, kwargs) - model.run(2, tensors, before, kwargs)
        expected.append((gradient[window] * change).sum(-1).flatten())
    torch.testing.assert_close(effects[2].slopes["", "w4"], torch.cat(expected), rtol=1e-4, atol=1e-6)


def test_scores_of_the_paper(tiny: Any, tmp_path: Path) -> None:
    """Guards: LTS and LRS taken from something else than the layer's input and outputs."""
    _, directory = tiny("llama")
    model = StreamedModel(directory)
    windows, scales, effects = swept(model, Workspace(tmp_path / "work", {}))
    hidden, arguments = model.begin(windows)
    w4, lts, lrs = RoundToNearest("w4"), [], []
    for states, kwargs in zip(hidden, arguments[0], strict=True):
        out = model.run(0, model.layer(0), states, kwargs)
        quantized = w4.run(model, 0, model.layer(0), states, kwargs)
        lts.append(torch.cosine_similarity(out, states, dim=-1))
        lrs.append(torch.cosine_similarity(out, quantized, dim=-1))
    assert effects[0].transformation == pytest.approx(float(torch.cat(lts).mean()), rel=1e-5)
    assert effects[0].replacement["", "w4"] == pytest.approx(float(torch.cat(lrs).mean()), rel=1e-5)
    assert effects[0].replacement["", "w4"] < effects[0].replacement["", "w8"] < 1


def test_every_family_is_scaled_in_three_places(tiny: Any, tmp_path: Path) -> None:
    """Guards: a family whose names are missed, so that nothing is gained and nobody is told."""
    for family in FAMILIES:
        model = StreamedModel(tiny(family)[1])
        workspace = Workspace(tmp_path / family, {})
        forward_sweep(model, torch.randint(3, 64, (2, 10)), workspace)
        assert {name: len(s.values) for name, s in workspace.load("scales", 2).items()} == {
            "self_attn.qkv_proj": 64, "mlp.gate_up_proj": 64, "mlp.down_proj": 96,
        }  # fmt: skip


def test_the_scale_is_made_for_all_that_read_the_input(tiny: Any, tmp_path: Path) -> None:
    """Guards: scales fitted to q alone, folded into k and v too."""
    whole, directory = tiny("llama")
    model, windows = StreamedModel(directory), torch.randint(3, 64, (2, 10))
    inputs: list[torch.Tensor] = []
    attention = decoder_layers(whole)[0].self_attn
    handle = attention.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    for window in windows:
        whole(window[None])
    handle.remove()
    weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    workspace = Workspace(tmp_path / "work", {})
    forward_sweep(model, windows, workspace)
    found = workspace.load("scales", 0)["self_attn.qkv_proj"]
    torch.testing.assert_close(found.values, choose_scale(torch.cat(inputs), weight).values)


def test_a_killed_run_goes_on_to_the_same_end(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: results of two runs mixed, or all of it done again."""
    model = StreamedModel(tiny("llama")[1])
    _, _, whole = swept(model, Workspace(tmp_path / "whole", {}))
    saves = 0
    original = Workspace.save

    def dies(self: Workspace, what: str, index: int, value: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 11:
            raise KeyboardInterrupt
        original(self, what, index, value)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            swept(model, Workspace(tmp_path / "killed", {}))
    done: list[int] = []
    original_run = StreamedModel.run
    monkeypatch.setattr(StreamedModel, "run", lambda self, i, *a: (done.append(i), original_run(self, i, *a))[1])
    _, _, resumed = swept(model, Workspace(tmp_path / "killed", {}))
    assert set(done) == {0, 1}, "layer 2 was done before"
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a.slopes[key], b.slopes[key]) for key in a.slopes)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    """Guards: a profile made of two calibrations."""
    Workspace(tmp_path / "work", {"seed": 0})
    with pytest.raises(ProfilingError, match="begun with other settings"):
        Workspace(tmp_path / "work", {"seed": 1})


def test_a_full_disk_is_reported_and_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: half a file that the next run takes for a result."""
    workspace = Workspace(tmp_path / "work", {})

    def full(value: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ProfilingError, match="No space left.*goes on here"):
        workspace.save("hidden", 0, torch.zeros(1))
    assert not workspace.has("hidden", 0)
    assert [file.name for file in workspace.directory.iterdir()] == ["settings.json"]


class Words:
    """A tokenizer."""

    def __init__(self, *_: Any) -> None: ...

    def encode(self, text: str) -> list[int]:
        return [3 + len(word) % 60 for word in text.split()]


def test_a_profile_from_model_to_directory(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a ladder that does not start at level 0, loses a layer, or differs from run to run."""
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", Words)
    text = tmp_path / "text.txt"
    text.write_text(" ".join("x" * (i * 7 % 50) for i in range(200)))
    profiles = []
    for name in ("one", "two"):
        job = ProfileJob(str(tiny("qwen3")[1]), (text,), tmp_path / name, ("w8", "w4"), 2, 16, 2, 2, 0)
        profiles.append(run_profile(job, None, ())[0])
        assert not (tmp_path / f"{name}.unfinished").exists()
    first, second = profiles
    assert first.ladder == second.ladder and first.order == second.order
    assert first.ladder[0].layers == {} and first.ladder[-1].layers == dict.fromkeys(range(3), "w4")
    assert sorted(first.order) == [0, 1, 2]
    kls = [level.expected_kl for level in first.ladder]
    freed = [level.bytes_freed for level in first.ladder]
    assert kls == sorted(kls) and freed == sorted(freed)
    assert set(first.scales) == {0, 1, 2}


def test_order_of_first_touch() -> None:
    """Guards: a layer that the ladder never touches missing from the order."""
    moves = [Move(Change(layer, fmt), 0.0, 0) for layer, fmt in ((2, "w8"), (0, "w8"), (2, "w4"))]
    assert swap_order(moves, 4) == (2, 0, 1, 3)


def test_fused_names() -> None:
    """Guards: q, k and v scaled one by one, or Phi's fused linears not found."""
    assert parts_of({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}) == {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    assert parts_of({"mlp.gate_up_proj"}) == {"mlp.gate_up_proj": ("mlp.gate_up_proj",)}


def test_norm_names_are_those_below_the_layers(tiny: Any) -> None:
    """Guards: a fingerprint that vLLM's names can never match."""
    names = {name for name, _ in StreamedModel(tiny("qwen3")[1]).norms()}
    assert {"0.input_layernorm.weight", "2.post_attention_layernorm.weight", "1.self_attn.q_norm.weight"} <= names


def test_what_cannot_be_profiled_is_refused(tiny: Any, tmp_path: Path) -> None:
    """Guards: an attribute error from deep inside another library."""
    with pytest.raises(ProfilingError, match="no decoder layers"):
        decoder_layers(torch.nn.Linear(2, 2))
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    one_word = type("Lengths", (), {"encode": lambda _, text: [len(word) for word in text.split()]})()
    assert token_windows(one_word, [text], 1, 3).tolist() == [[1, 3, 5]]
    with pytest.raises(ProfilingError, match="has 3 tokens, 2 windows of 4 need 8"):
        token_windows(one_word, [text], 2, 4)
    job = ProfileJob(str(tmp_path / "none"), (text,), tmp_path / "out", ("w8",), 1, 2, 1, 1, 0)
    with pytest.raises(ConfigError, match="neither a directory nor a hub repository"):
        run_profile(job, None, ())


def test_the_papers_order_by_whole_passes(tiny: Any) -> None:
    """Guards: MDS against the unquantized model instead of the one with the layers taken so far."""
    _, directory = tiny("llama")
    model, windows = StreamedModel(directory), torch.randint(3, 64, (2, 16))
    hidden, arguments = model.begin(windows)
    w4 = [RoundToNearest("w4") for _ in range(3)]

    def logits(taken: set[int]) -> list[torch.Tensor]:
        found = []
        for window, states in enumerate(hidden):
            for i in range(3):
                run = w4[i].run if i in taken else lambda m, *a: m.run(*a)
                states = run(model, i, model.layer(i), states, arguments[i][window])
            found.append(model.logits(states))
        return found

    def cosine(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        pairs = zip(a, b, strict=True)
        return float(torch.stack([torch.cosine_similarity(x, y, dim=-1).mean() for x, y in pairs]).mean())

    states = [[h] for h in hidden]
    for window, row in enumerate(states):
        for i in range(3):
            row.append(model.run(i, model.layer(i), row[-1], arguments[i][window]))
    taken: list[int] = []
    lts = [cosine([s[i + 1] for s in states], [s[i] for s in states]) for i in range(3)]
    quantized = [
        [w4[i].run(model, i, model.layer(i), s[i], arguments[i][w]) for w, s in enumerate(states)] for i in range(3)
    ]
    lrs = [cosine([s[i + 1] for s in states], quantized[i]) for i in range(3)]
    while len(taken) < 3:
        now = logits(set(taken))
        left = [p for p in range(3) if p not in taken]
        lis = {p: 0.25 * lts[p] + 0.25 * lrs[p] + 0.5 * cosine(now, logits({*taken, p})) for p in left}
        taken.append(max(left, key=lis.__getitem__))
    assert lis_order(model, windows, "w4") == taken


def test_halves_of_a_layer(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a half that quantizes the other one, and a ladder that loses a half."""
    import transformers

    model = StreamedModel(tiny("llama")[1])
    hidden, arguments = model.begin(torch.randint(3, 64, (1, 16)))
    tensors, kwargs = model.layer(0), arguments[0][0]
    exact = model.run(0, tensors, hidden[0], kwargs)
    whole = RoundToNearest("w4").run(model, 0, tensors, hidden[0], kwargs) - exact
    halves = [RoundToNearest("w4", half=h).run(model, 0, tensors, hidden[0], kwargs) - exact for h in HALVES]
    for half in halves:
        assert 0.1 < float(half.norm() / whole.norm()) < 1.1
    assert float((halves[0] + halves[1] - whole).norm() / whole.norm()) < 0.5

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", Words)
    text = tmp_path / "text.txt"
    text.write_text(" ".join("x" * (i * 7 % 50) for i in range(200)))
    job = ProfileJob(str(tiny("llama")[1]), (text,), tmp_path / "out", ("w8", "w4"), 2, 16, 2, 1, 0, halves=True)
    profile = run_profile(job, None, ())[0]
    assert profile.ladder[-1].layers == dict.fromkeys(range(3), "w4")
    assert any("/" in fmt for level in profile.ladder for fmt in level.layers.values())
    assert len(profile.ladder) > 6


class _Runs:
    """Pickled, this makes a directory where it is read."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def test_an_unfinished_profile_runs_nothing(tmp_path: Path) -> None:
    """Guards: a file in a directory that others can write, whose reading runs what they like; and a damaged one that
    ends in a library's traceback."""
    workspace = Workspace(tmp_path / "work", {})
    workspace.save("hidden", 0, {"x": _Runs(tmp_path / "made")})
    with pytest.raises(ProfilingError, match=r"hidden-0000.pt cannot be read.*Delete .*work, and start again"):
        workspace.load("hidden", 0)
    assert not (tmp_path / "made").exists()
    (tmp_path / "work" / "hidden-0000.pt").write_bytes(b"half")
    with pytest.raises(ProfilingError, match="cannot be read"):
        workspace.load("hidden", 0)
    assert stat.S_IMODE((tmp_path / "work").stat().st_mode) == 0o700
