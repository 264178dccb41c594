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

ROOT = Path(__file__).parents[2]
LADDER = {"steps": [{"format": "w8", "layers_per_level": 30}, {"format": "w4", "layers_per_level": 30}]}


@pytest.fixture(scope="module")
def profile(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as a user makes it."""
    out = tmp_path_factory.mktemp("profiles") / "demo"
    text = ROOT / "scripts" / "corpus" / "wikitext2.txt"
    command = [sys.executable, ROOT / "scripts" / "profile_layers.py", demo_model, "--text", text, "--out", out]
    done = subprocess.run([*command, "--windows", "3", "--length", "256"], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["profile"] == str(out) and document["layers"] == 30
    assert document["error"] < 0.7 * document["error_plain"]
    return out


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


@pytest.mark.parametrize("eager", [True, False])
def test_smoothed_w8_is_closer_to_full_precision(
    demo_model: Path, variant_cache: Path, profile: Path, eager: bool
) -> None:
    """Guards: norms that a compiled graph does not read anew, scales folded in on one side only, and a W4
    layer behind the norm of a W8 one: each of them ruins the text."""
    text = (ROOT / "scripts" / "corpus" / "wikitext2.txt").read_text(encoding="utf-8")[60_000:]
    found = {}
    for name, path in (("plain", None), ("smoothed", str(profile))):
        with engine(
            demo_model, variant_cache, {"ladder": LADDER, "profile": path}, enforce_eager=eager,
            enable_prefix_caching=False,
        ) as llm:  # fmt: skip
            ids = llm.get_tokenizer().encode(text)[:384]
            stock = generate(llm, PROMPTS[:2], 8)
            found[name] = kl_by_level(llm, ids)
            assert generate(llm, PROMPTS[:2], 8) == stock
            memory = morph_of(llm).executor._executor.collective_rpc("morphserve_memory")[0]
            assert memory["weight_bytes"] == morph_of(llm).controller.status()["ledger"]["weights_bytes"]
    assert found["smoothed"][0] < 0.6 * found["plain"][0]
    assert found["smoothed"][1] == pytest.approx(found["plain"][1], rel=1e-6), "w4 layers are not smoothed"


def test_profile_of_another_model_is_refused(tiny_llama: Path, variant_cache: Path, profile: Path) -> None:
    """Guards: scales of one model folded into another."""
    with (
        pytest.raises(ConfigError, match="was made for other weights"),
        engine(tiny_llama, variant_cache, {"profile": str(profile)}, skip_tokenizer_init=True),
    ):
        pass
