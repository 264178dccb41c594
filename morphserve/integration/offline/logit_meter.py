"""On the ranks of an engine: what a text's next-token distributions are beside those at full precision.

A rank computes it where the logits are, and only figures travel: of 512 tokens a large vocabulary's are 250 MB.
Functions travel by name, so each rank imports this module. Of several ranks some have no logits, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from morphserve.integration import seams


@dataclass(slots=True)
class _Meter:
    """What this rank has seen since the last text."""

    rows: list[torch.Tensor] = field(default_factory=list)  # log probabilities of prompts' next tokens, on the host
    base: torch.Tensor | None = None  # those of a text at full precision: fp32 [len(text) - 1, vocabulary]


_meter = _Meter()


def install(worker: Any, least_rows: int) -> None:
    """Record the logits of prompts on this rank: of calls with `least_rows` or more, as fewer are sampled tokens'."""
    global _meter
    _meter = _Meter()

    def record(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_logits(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            logits = original(hidden, *args, **kwargs)
            if logits is not None and len(logits) >= least_rows:
                _meter.rows.append(logits.float().log_softmax(-1).cpu())
            return logits

        return compute_logits

    seams.wrap(seams.LOGITS, record, on=worker.model_runner.model)


def clear(worker: Any) -> None:
    """Forget what was recorded since the last text."""
    _meter.rows.clear()


def take(worker: Any, ids: Sequence[int], is_base: bool) -> dict[str, float] | None:
    """Return sums over the positions of the text that was just computed; None on a rank without logits.

    Args:
        worker: vLLM's.
        ids: the text's tokens.
        is_base: at full precision; what follows is compared with it.

    Returns:
        `nll` (nats), and of a text that is not the base, `kl` of it and `top1`, the positions of equal argmax.
    """
    if not _meter.rows:
        return None
    found = torch.cat(_meter.rows)[: len(ids) - 1]
    _meter.rows.clear()
    sums = {"nll": -float(found.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum())}
    if is_base:
        _meter.base = found
        return sums
    base = _meter.base
    assert base is not None, "a text is compared with its own at full precision"
    sums["kl"] = float((base.exp() * (base - found)).sum())
    sums["top1"] = float((base.argmax(-1) == found.argmax(-1)).sum())
    return sums
