"""Does it matter when in an answer its tokens come from a quantized level? One server, the same prompts, four ways.

All of each answer at full precision, its second half with all layers in FORMAT (late), its first half (early), all of
it. The prompts of a turn are asked at once; the level is changed when the slowest of them has half of its tokens, and
a second or more goes by until it is there: the tokens of that time, as many as the slowest change took, are left out
of all four ways. Then the model at full precision, in fp32, reads every answer, as `morphserve served-kl` does.

Output columns: way, half of the answer, tokens, share (%) of them that were computed in FORMAT, KL (nats a token, of
full precision from what was served: at least, see `morphserve served-kl`), +- (one standard error over answers), ln p
(mean log probability of the served tokens at full precision: how likely the answer is as a text), +-, same (share (%)
of greedy answers whose tokens are, until there, those of the answer at full precision; `full` is held against itself).
In its second half `early` is at full precision, and reads a KV cache that FORMAT wrote.
Last stdout line: one JSON document {"model", "format", "temperature", "rows", "left_out" (tokens behind the middle),
"early_minus_late" (by prompt, over both halves: of KL and of ln p the mean and its standard error)}.

    python scripts/early_late.py --model MODEL_DIR --format w4 --turns 2
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from morphserve.files import write_whole
from morphserve.hub import find_files
from morphserve.serve_dtype import add_dtype_option, resolve_dtype
from morphserve.tools.admin import NotOrdered, order_state, send_order
from morphserve.tools.bench import ClientOptions, ServerOptions, completion_body, send, serve
from morphserve.tools.checks import at_least, between
from morphserve.tools.command import command_parser, run_command, say
from morphserve.tools.quality import Scored, score_answers
from morphserve.tools.tables import text_table
from morphserve.tools.workload import (
    Outcome,
    ReplayError,
    ServedAnswer,
    load_answers,
    load_encoder,
    read_corpus,
    save_answers,
)

CORPUS = Path(__file__).resolve().parent / "corpus" / "wikitext2.txt"
# Level of each half: 0, or 1, which has all layers in FORMAT.
WAYS = {"full": (0, 0), "late": (0, 1), "early": (1, 0), "all": (1, 1)}
HALVES = ("first", "second")
_HEAD = ("way", "half", "tokens", "in FORMAT", "KL", "+-", "ln p", "+-", "same")
_PROMPT_TOKENS = 48
_SETTLED_S = 120.0
_DAY_S = 86400
_TOP = 200  # tokens at each place: of greedy answers nearly all of the probability


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--format", default="w4", help="of all layers, where it is not full precision")
    parser.add_argument("--turns", type=at_least(1), default=2)
    parser.add_argument("--prompts", type=at_least(2), default=12, help="of a turn")
    parser.add_argument("--output-tokens", type=at_least(8), default=384)
    parser.add_argument("--temperature", type=between(0.0, 100.0), default=0.0)
    parser.add_argument("--out", type=Path, default=Path("reports/early_late"), help="answers and the server's log")
    parser.add_argument("--cpu-bind", default="0", help="core of the engine; the client needs another")
    add_dtype_option(parser)
    args = parser.parse_args(argv)
    return run_command("early_late", lambda: _measure(args), "the server was stopped")


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    args.out.mkdir(parents=True, exist_ok=True)
    ids = load_encoder(args.model)(read_corpus(CORPUS), False)
    number = args.turns * args.prompts
    if len(ids) < number * _PROMPT_TOKENS:
        raise ReplayError(f"--turns by --prompts is {number}: there is text for {len(ids) // _PROMPT_TOKENS} prompts.")
    prompts = [ids[i * len(ids) // number :][:_PROMPT_TOKENS] for i in range(number)]
    outcomes = _served(args, prompts)
    from morphserve.tools.profile import StreamedModel  # torch and transformers: not before they are needed

    model = StreamedModel(find_files(args.model, "model"))
    answers: dict[str, list[ServedAnswer]] = {}
    for way, found in outcomes.items():
        (args.out / way).mkdir(exist_ok=True)
        save_answers(args.out / way, prompts, found)
        answers[way] = load_answers(args.out / way)
        if len(answers[way]) < number:
            raise ReplayError(f"{way}: {len(answers[way])} of {number} answers were recorded whole. The log says why.")
    left_out = tokens_of_change(answers)
    scored = {way: score_answers(model, answers[way]) for way in WAYS}
    tokens = answers if args.temperature == 0 else None
    rows = [row for way in WAYS for row in way_rows(way, scored[way], left_out, tokens)]
    say("\n".join(text_table(_HEAD, [_cells(row) for row in rows])))
    between = {name: paired(scored["early"], scored["late"], left_out, name) for name in ("kl", "logprob")}
    return {
        "model": args.model, "format": args.format, "temperature": args.temperature, "rows": rows,
        "left_out": left_out, "early_minus_late": between,
    }  # fmt: skip


def _served(args: argparse.Namespace, prompts: Sequence[list[int]]) -> dict[str, list[Outcome]]:
    """Return the answers to all prompts, by way."""
    token_file = args.out.resolve() / "token"
    token_file.unlink(missing_ok=True)
    with os.fdopen(os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(16))
    # The policy decides nothing here: a level is pinned at all times, and KV blocks are ample.
    config = args.out.resolve() / "morph.yaml"
    # One level above 0, whatever it costs. Of 4,096 layers: of all that there are.
    ladder = {"steps": [{"format": args.format, "layers_per_level": 4096}], "expected_kl": {args.format: 1.0}}
    settings = {
        "prepared": False, "ladder": ladder, "quality": {"max_kl_per_token": 2.0},
        "admin": {"token_file": str(token_file)}, "policy": {"kind": "slo"},
    }  # fmt: skip
    write_whole(config, json.dumps(settings))
    longest = _PROMPT_TOKENS + args.output_tokens
    options = ServerOptions(
        model=args.model, num_blocks=args.prompts * (longest // 32 + 2) + 1, block_size=32,
        max_model_len=longest + 32, max_num_seqs=args.prompts, dtype=resolve_dtype(args.dtype, args.model),
        enforce_eager=True, cpu_bind=args.cpu_bind,
        extra_args=("--plugin", "morphserve", "--morphserve-config", str(config), "--max-logprobs", str(_TOP)),
    )  # fmt: skip
    found: dict[str, list[Outcome]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        stack.callback(token_file.unlink)
        server = stack.enter_context(serve(options, args.out / "server.log"))
        client = ClientOptions(server.url, options.served_model_name, token_ids=True, top_logprobs=_TOP)
        asker = Asker(client, token_file, args.output_tokens, args.temperature)
        for turn in range(args.turns):
            indices = range(turn * args.prompts, (turn + 1) * args.prompts)
            for way, levels in WAYS.items():
                say(f"turn {turn + 1} of {args.turns}: {way}")
                found[way] += asyncio.run(asker.ask({i: prompts[i] for i in indices}, levels))
    return found


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks a server for answers that change their level half way."""

    client: ClientOptions
    token_file: Path  # of the server's orders
    output_tokens: int  # of each answer
    temperature: float

    async def ask(self, prompts: Mapping[int, list[int]], levels: tuple[int, int]) -> list[Outcome]:
        """Ask all prompts at once; order the second level when each has half of its answer."""
        await self._pin(levels[0])
        outcomes = [Outcome(index, 0.0, len(prompt), self.output_tokens) for index, prompt in prompts.items()]
        is_ordered = False
        async with aiohttp.ClientSession() as session:
            zero = time.perf_counter()
            tasks = [asyncio.create_task(send(session, self.client, self._body(prompts[o.index]), o, zero))
                     for o in outcomes]  # fmt: skip
            while not any(task.done() for task in tasks):
                if min(len(o.token_ids) for o in outcomes) >= self.output_tokens // 2:
                    await self._pin(levels[1])
                    is_ordered = True
                    break
                await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)
        if failed := [o for o in outcomes if not o.ok]:
            why = f"{failed[0].status} {failed[0].error}"
            raise ReplayError(f"{len(failed)} of {len(outcomes)} were not answered: {why}")
        if not is_ordered:
            raise ReplayError("an answer ended before all others had their half. Ask fewer --prompts at once.")
        return outcomes

    def _body(self, prompt: list[int]) -> dict[str, Any]:
        return completion_body(self.client, prompt, self.output_tokens) | {"temperature": self.temperature}

    async def _pin(self, level: int) -> None:
        """Order a level, and wait until the engine is there."""
        url = self.client.url
        try:
            await asyncio.to_thread(send_order, url, self.token_file, "pin", {"level": level, "for_s": _DAY_S})
            deadline = time.monotonic() + _SETTLED_S
            while time.monotonic() < deadline:
                (engine,) = (await asyncio.to_thread(order_state, url, self.token_file))["engines"]
                if engine["level"] == engine["exposure_level"] == level:
                    return
                await asyncio.sleep(0.05)
        except NotOrdered as e:
            raise ReplayError(str(e)) from e
        raise ReplayError(f"the engine was not at level {level} after {_SETTLED_S:.0f} s. Its log says why.")


def tokens_of_change(answers: Mapping[str, Sequence[ServedAnswer]]) -> int:
    """Return how many tokens behind the middle of an answer still came from the level before, at most.

    Raises:
        ReplayError: in an answer no others came.
    """
    most = 0
    for way, levels in WAYS.items():
        for answer in answers[way]:
            half = len(answer.levels) // 2
            (others,) = np.nonzero(answer.levels[half:] != levels[1])
            most = max(most, int(others[-1]) + 1 if len(others) else 0)
            if (answer.levels[:half] != levels[0]).any() or most >= half:
                raise ReplayError(f"{way}: a half has tokens of another level throughout. Raise --output-tokens.")
    return most


def halves_of(num_tokens: int, left_out: int) -> tuple[slice, slice]:
    """Return the tokens of both halves; those of the change are in neither."""
    half = num_tokens // 2
    return slice(0, half), slice(half + left_out, num_tokens)


def way_rows(
    way: str, scored: Sequence[Scored], left_out: int, answers: Mapping[str, Sequence[ServedAnswer]] | None
) -> list[dict[str, Any]]:
    """Return the figures of the two halves of one way.

    Args:
        way: of `WAYS`.
        scored: its answers, all of one length.
        left_out: tokens behind the middle that count for neither half.
        answers: of all ways, the same prompts in the same order; None = drawn, so that equal tokens say nothing.
    """
    rows = []
    for number, half in enumerate(HALVES):
        part = halves_of(len(scored[0].kl), left_out)[number]
        kl, logprob = [each.kl[part].mean() for each in scored], [each.logprob[part].mean() for each in scored]
        levels = np.concatenate([each.levels[part] for each in scored])
        same = None if answers is None else float(np.mean([
            np.array_equal(own.tokens[: part.stop], full.tokens[: part.stop])
            for own, full in zip(answers[way], answers["full"], strict=True)
        ]))  # fmt: skip
        rows.append({
            "way": way, "half": half, "tokens": len(levels), "in_format": float((levels == 1).mean()),
            "kl": float(np.mean(kl)), "kl_error": _error(kl), "logprob": float(np.mean(logprob)),
            "logprob_error": _error(logprob), "same": same,
        })  # fmt: skip
    return rows


def paired(first: Sequence[Scored], second: Sequence[Scored], left_out: int, name: str) -> tuple[float, float]:
    """Return the mean difference of two ways by prompt, first minus second, over both halves, and its standard error.

    Args:
        first: the answers of a way.
        second: those of another, to the same prompts in the same order.
        left_out: tokens behind the middle that do not count.
        name: of what, "kl" or "logprob".
    """
    parts = halves_of(len(first[0].kl), left_out)

    def of(answer: Scored) -> float:
        return float(np.concatenate([getattr(answer, name)[part] for part in parts]).mean())

    differences = [of(a) - of(b) for a, b in zip(first, second, strict=True)]
    return float(np.mean(differences)), _error(differences)


def _error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    same = "" if row["same"] is None else f"{row['same']:.0%}"
    return (
        row["way"], row["half"], f"{row['tokens']:,}", f"{row['in_format']:.0%}", f"{row['kl']:.4f}",
        f"{row['kl_error']:.4f}", f"{row['logprob']:.3f}", f"{row['logprob_error']:.3f}", same,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
