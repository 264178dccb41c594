"""A profile makes W8 better, and level 0 stays what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.harness import PROMPTS, engine, follow, generate, morph_of, settle

from morphserve.errors import ConfigError
from quant_layers import ProfileLevel, probe, write_profile

ROOT = Path(__file__).parents[2]
LADDER = {"steps": [{"format": "w8", "layers_per_level": 10}, {"format": "w4", "layers_per_level": 10}]}


@pytest.fixture(scope="module")
def profiled(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A profile made as a user makes it, and what the script said."""
    out = tmp_path_factory.mktemp("profiles") / "demo"
    text = ROOT / "scripts" / "corpus" / "wikitext2.txt"
    command = [sys.executable, ROOT / "scripts" / "profile_layers.py", short_model, "--text", text, "--out", out]
    command += ["--windows", "2", "--length", "256", "--moves-per-level", "5"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def profile(profiled: tuple[Path, dict[str, Any]]) -> Path:
    return profiled[0]


def test_the_ladder_is_measured_where_it_is_served(profiled: tuple[Path, dict[str, Any]]) -> None:
    """Guards: levels in another order than their figures, predictions that have nothing to do with the model."""
    out, document = profiled
    ladder = document["ladder"]
    assert document["profile"] == str(out) and sorted(document["order"]) == list(range(10))
    assert [row["level"] for row in ladder] == [0, 1, 2, 3, 4]
    assert ladder[0] == {"level": 0, "expected_kl": 0.0, "measured_kl": 0.0, "bytes_freed": 0,
                         "step_time_factor": 1.0, "layers": {}}  # fmt: skip
    for key in ("expected_kl", "measured_kl", "bytes_freed"):
        figures = [row[key] for row in ladder]
        assert figures == sorted(figures), key
    for row in ladder[1:]:
        assert 0.6 < row["expected_kl"] / row["measured_kl"] < 1.6, row["level"]  # 512 tokens each
        assert row["step_time_factor"] > 0.2
    assert set(ladder[-1]["layers"].values()) == {"w4"}


def test_a_served_ladder_is_the_profiles(
    short_model: Path, variant_cache: Path, profiled: tuple[Path, dict[str, Any]]
) -> None:
    """Guards: a profile that is loaded and not followed."""
    out, document = profiled
    config = {"profile": str(out), "quality": {"max_kl_per_token": 100}}
    with engine(short_model, variant_cache, config, enable_prefix_caching=False) as llm:
        ladder = morph_of(llm).runtime.ladder
        for level, row in zip(ladder, document["ladder"], strict=True):
            assert {str(i): f for i, f in enumerate(level.layer_formats) if f != "base"} == row["layers"]
            assert level.expected_kl == row["measured_kl"]
            assert ladder[0].weight_bytes - level.weight_bytes == row["bytes_freed"]
        stock = generate(llm, PROMPTS[:2], 8)
        for level in (1, 3, len(ladder) - 1, 0):
            follow(llm, {0: level})
            settle(llm, level)
        assert generate(llm, PROMPTS[:2], 8) == stock


def logprobs(llm: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities at every position of a prompt: [len(ids), vocabulary]."""
    core = llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    rows: list[torch.Tensor] = []
    original = model.compute_logits

    def compute_logits(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = original(hidden, *args, **kwargs)
        if len(logits) > 1:
            rows.append(logits.float().log_softmax(-1))
        return logits

    from vllm import SamplingParams

    model.compute_logits = compute_logits
    try:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    finally:
        del model.compute_logits
    return torch.cat(rows)


def kl_by_level(llm: Any, ids: list[int]) -> list[float]:
    base = logprobs(llm, ids)
    found = []
    for level in (1, 2):
        follow(llm, {0: level})
        settle(llm, level)
        other = logprobs(llm, ids)
        found.append(float((base.exp() * (base - other)).sum(-1).mean()))
    follow(llm, {0: 0})
    settle(llm, 0)
    assert torch.equal(logprobs(llm, ids), base), "level 0 is not what it was"
    return found


@pytest.fixture(scope="module")
def rounds_activations() -> str:
    """A W8 kernel that rounds activations to 8 bits: one with finer steps has nothing to gain from input scales."""
    import vllm._custom_ops  # noqa: F401  loads vLLM's operators

    reports = probe(torch.bfloat16)
    names = [name for name in ("w8a8_vnni", "w8a8_onednn") if reports[name].ok]
    if not names:
        pytest.skip(f"no W8 kernel here rounds activations to 8 bits: {reports['w8a8_onednn'].reason}")
    return names[0]


def served_kl(model: Path, cache: Path, profile: Path | None, kernel: str, eager: bool = True) -> list[float]:
    """KL at all W8 and at all W4, with and without the input scales of a profile."""
    config = {"ladder": LADDER, "profile": None if profile is None else str(profile), "kernels": {"w8": kernel}}
    in_bf16 = {"dtype": "bfloat16", "max_num_batched_tokens": 512}  # slow on lower tiers: few tokens
    with engine(model, cache, config, enforce_eager=eager, enable_prefix_caching=False, **in_bf16) as llm:
        text = (ROOT / "scripts" / "corpus" / "wikitext2.txt").read_text(encoding="utf-8")[60_000:]
        stock = generate(llm, PROMPTS[:2], 8)
        found = kl_by_level(llm, llm.get_tokenizer().encode(text)[:384])
        assert generate(llm, PROMPTS[:2], 8) == stock
        memory = llm.collective_rpc("morphserve_memory")[0]
        assert memory["weight_bytes"] == morph_of(llm).controller.status()["ledger"]["weights_bytes"]
    return found


@pytest.fixture(scope="module")
def plain(short_model: Path, variant_cache: Path, rounds_activations: str) -> list[float]:
    return served_kl(short_model, variant_cache, None, rounds_activations)


@pytest.mark.parametrize("eager", [True, False])
def test_smoothed_w8_is_closer_to_full_precision(
    short_model: Path, variant_cache: Path, profile: Path, plain: list[float], rounds_activations: str, eager: bool
) -> None:
    """Guards: norms that a compiled graph does not read anew, scales folded in on one side only, and a W4
    layer behind the norm of a W8 one: each of them ruins the text."""
    smoothed = served_kl(short_model, variant_cache, profile, rounds_activations, eager)
    assert smoothed[0] < 0.6 * plain[0]
    assert smoothed[1] == pytest.approx(plain[1], rel=1e-6 if eager else 0.05), "w4 layers are not smoothed"


def test_profile_of_another_model_is_refused(
    tiny_llama: Path, variant_cache: Path, profile: Path, tmp_path: Path
) -> None:
    """Guards: scales of one model folded into another."""
    sister = tmp_path / "sister"
    write_profile(sister, "0" * 64, {}, (ProfileLevel({}, 0.0), ProfileLevel({5: "w8"}, 0.1)), range(6), {}, {})
    for path, words in ((profile, "of a model with 10 decoder layers"), (sister, "was made for other weights")):
        with (
            pytest.raises(ConfigError, match=words),
            engine(tiny_llama, variant_cache, {"profile": str(path)}, skip_tokenizer_init=True),
        ):
            pass
