"""How much do the demo model's figures owe to its birth in 4 bits? Trains it on until its weights have left that grid.

The demo model is dequantized from Q4_1: each 32 weights of a row have one of 16 values, evenly spaced. Some steps of
AdamW in fp32, one row of 256 tokens each, move them off; `morphserve measure-kl` and `scripts/compare_orders.py` tell
what W8 and W4 cost the result, and whether the order of layers stays. Under twenty minutes on one core.

Output columns: step, loss, off_grid (RMS distance of a weight to the nearest of the 16 values of its 32, in steps of
that grid: 0 on it, 0.289 anywhere), moved (RMS change of the decoder's weights over their RMS).
Last stdout line: one JSON document {"model", "steps", "off_grid": [before, after], "moved"}.

    python scripts/off_grid.py ~/.cache/morphserve/models/smollm2-135m-instruct --text wikitext2-valid.txt --out trained
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from morphserve.tools.command import command_parser, fail, finish

_ROW_TOKENS, _WARM_UP, _EVERY = 256, 20, 25
_GROUP, _LEVELS = 32, 16  # of Q4_1


def main(argv: list[str] | None = None) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = command_parser(__doc__)
    parser.add_argument("model", help="directory of the demo model")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="to train on")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new model")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        ids = torch.tensor([token for file in args.text for token in tokenizer.encode(file.read_text("utf-8"))])
    except (OSError, ValueError) as e:
        return fail("off_grid", e)
    rows = ids[: len(ids) // _ROW_TOKENS * _ROW_TOKENS].view(-1, _ROW_TOKENS)
    if not len(rows):
        return fail("off_grid", ValueError(f"--text has {len(ids)} tokens, a row has {_ROW_TOKENS}: give a longer one"))
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name]
    born = [weight.clone() for weight in _weights(linears)]
    before = off_grid(born)
    print(f"{'step':>5} {'loss':>7} {'off_grid':>9} {'moved':>7}", flush=True)
    for step, loss in train(model, rows, args.steps, args.learning_rate):
        if step % _EVERY == 0:
            now = _weights(linears)
            print(f"{step:5} {loss:7.3f} {off_grid(now):9.3f} {moved(born, now):7.4f}", flush=True)
    now = _weights(linears)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    told = {"model": str(args.out), "steps": args.steps, "off_grid": [before, off_grid(now)], "moved": moved(born, now)}
    return finish(told)


def train(model: torch.nn.Module, rows: torch.Tensor, num_steps: int, rate: float) -> Iterator[tuple[int, float]]:
    """Train on one row a step, at a rate that falls as a cosine to a tenth; yield each step, from 1, and its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    order = torch.randperm(len(rows))
    for step in range(num_steps):
        fall = 0.1 + 0.45 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / _WARM_UP) * fall
        row = rows[order[step % len(order)]][None]
        loss = model(row, labels=row).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step + 1, loss.item()


def off_grid(weights: list[torch.Tensor]) -> float:
    """Return the RMS distance of weights [N, K] to the nearest of 16 even values between the ends of each 32."""
    squares, number = 0.0, 0
    for weight in weights:
        groups = weight.reshape(-1, _GROUP)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        places = (groups - low) / ((high - low) / (_LEVELS - 1)).clamp(min=1e-12)
        squares += ((places - places.round()) ** 2).sum().item()
        number += places.numel()
    return math.sqrt(squares / number)


def moved(born: list[torch.Tensor], now: list[torch.Tensor]) -> float:
    """Return how far weights have moved, over their size: both RMS."""
    change = sum(((new - old) ** 2).sum().item() for old, new in zip(born, now, strict=True))
    return math.sqrt(change / sum((old**2).sum().item() for old in born))


def _weights(linears: list[torch.nn.Linear]) -> list[torch.Tensor]:
    return [linear.weight.detach() for linear in linears]


if __name__ == "__main__":
    sys.exit(main())
