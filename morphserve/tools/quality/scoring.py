"""How far what was served is from full precision, token by token, on the very text that was served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morphserve.tools.profile import StreamedModel
from morphserve.tools.workload import UNKNOWN, ServedAnswer

_ROWS = 512  # positions whose logits exist at once
_TOKENS = 16384  # of all sequences whose hidden states exist at once
_LEAST = 1e-9  # probability of what was not recorded, below which rounding decides


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer, by token."""

    kl: NDArray[np.float64]  # nats, of full precision from what was served, at least
    seen: NDArray[np.float64]  # probability, at full precision, of the tokens that were recorded
    logprob: NDArray[np.float64]  # nats, at full precision, of the token that was served
    levels: NDArray[np.int16]


def score_answers(
    model: StreamedModel, answers: Sequence[ServedAnswer], on_layer: Callable[[int, int], None] = lambda *_: None
) -> list[Scored]:
    """Feed the model what was served, and compare what it expects at each token with what the server did.

    Decoder layers are read one at a time, once for as many answers as 16,384 tokens take.

    Args:
        model: at full precision; it computes in fp32.
        answers: as recorded.
        on_layer: hears how many layers are done, and of how many.

    Returns:
        One for each answer, in their order.
    """
    scored: list[Scored] = []
    batches = list(_batches(answers))
    for number, batch in enumerate(batches):
        # The last token is nobody's context.
        windows = [torch.from_numpy(np.concatenate([a.prompt, a.tokens[:-1]]).astype(np.int64)) for a in batch]
        with torch.inference_mode():
            hidden, arguments = model.begin(windows)
            for layer in range(len(model)):
                tensors = model.layer(layer)
                hidden = [model.run(layer, tensors, h, a) for h, a in zip(hidden, arguments[layer], strict=True)]
                on_layer(number * len(model) + layer + 1, len(batches) * len(model))
            scored += [_score(model, answer, h) for answer, h in zip(batch, hidden, strict=True)]
    return scored


def divergence(expected: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(expected || served) by position, and the probability that `expected` gives to what was recorded.

    What was not recorded counts as one event, so the sum of all events is a lower bound of the divergence over the
    vocabulary (data processing inequality), and meets it as what was seen comes to 1.

    Args:
        expected: log probabilities [positions, vocabulary], nats.
        ids: recorded tokens [positions, K], each once in a row; UNKNOWN where there are fewer.
        logprobs: theirs [positions, K], as served, nats.
    """
    is_known = ids != UNKNOWN
    own = expected.gather(1, ids.clamp(min=0)).double()
    p = torch.where(is_known, own.exp(), 0.0)
    terms = torch.where(is_known, p * (own - logprobs.double()), 0.0)
    q = torch.where(is_known, logprobs.double().exp(), 0.0)
    rest_p, rest_q = ((1.0 - x.sum(1)).clamp(min=_LEAST) for x in (p, q))
    return terms.sum(1) + rest_p * (rest_p / rest_q).log(), p.sum(1)


def _batches(answers: Sequence[ServedAnswer]) -> Iterator[list[ServedAnswer]]:
    batch: list[ServedAnswer] = []
    for answer in answers:
        batch.append(answer)
        if sum(len(a.prompt) + len(a.tokens) for a in batch) >= _TOKENS:
            yield batch
            batch = []
    if batch:
        yield batch


def _score(model: StreamedModel, answer: ServedAnswer, hidden: Tensor) -> Scored:
    first = len(answer.prompt) - 1  # where the first token of the answer is predicted
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(answer.tokens), _ROWS):
        rows = slice(start, min(start + _ROWS, len(answer.tokens)))
        expected = model.logits(hidden[:, first + rows.start : first + rows.stop]).log_softmax(-1)
        ids, logprobs, tokens = (
            torch.from_numpy(array[rows]) for array in (answer.top_ids, answer.top_logprobs, answer.tokens)
        )
        of_token = expected.gather(1, tokens.long()[:, None])[:, 0]
        parts.append((*divergence(expected, ids.long(), logprobs), of_token))
    kl, seen, logprob = (torch.cat(part).double().numpy() for part in zip(*parts, strict=True))
    return Scored(kl, seen, logprob, answer.levels)
