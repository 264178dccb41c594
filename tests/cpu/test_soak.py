"""What `morphserve soak` calls wrong: each thing that must hold, not holding once; and the model whose answers it knows."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morphserve.tools.soak import answer, make_model
from morphserve.tools.soak.judge import report
from morphserve.tools.soak.load import GIVEN_UP, Ask, Books, draw_burst
from morphserve.tools.soak.recall import DISTANCE, NUM_TOKENS
from morphserve.tools.soak.trend import percentile, slope
from morphserve.tools.workload import OK, Outcome

pytestmark = pytest.mark.cpu


def _prompt(seed: int, length: int = DISTANCE + 20) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(NUM_TOKENS) for _ in range(length)]


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model, as transformers runs it."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = make_model(tmp_path_factory.mktemp("recall") / "model")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def test_the_model_answers_as_the_books_expect(recall: Any) -> None:
    """Guards: books that call every answer wrong, or a model whose tokens hang on a rounding."""
    import torch

    prompts = [_prompt(seed) for seed in range(4)]
    with torch.inference_mode():
        made = recall.generate(torch.tensor(prompts), max_new_tokens=70, min_new_tokens=70, do_sample=False)
        logits = recall(torch.tensor(prompts)).logits[:, -1].float()
    assert [row[len(prompts[0]) :].tolist() for row in made] == [answer(prompt, 70) for prompt in prompts]
    first, second = logits.topk(2).values.unbind(-1)
    assert bool((second < 0.3 * first).all()), "the right token does not lead by far"
