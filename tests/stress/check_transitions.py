"""Does an engine that changes its level at nearly every step lose a request, or give a wrong token? 1e5 times.

A real engine, its levels as fast as the controller allows, requests live all the time: they come, share beginnings,
end, and are given up. Model `recall` (morphserve/tools/soak/recall.py) has answers that are known, and the same at
every level, so each token of each request is held against the right one. Every thousand transitions the engine is
emptied and asked the same few prompts at level 0 and at two other levels: tokens and log probabilities must be, bit by
bit, what that level gave when the engine was new. Model `random` is for that alone: there the last bit of every weight
tells.

Runs in pieces, each a new engine; rows add up in --out. At the end of each piece something is broken, which must be
found: blocks that are not copied, tables that are not rewritten, a request that the engine forgets.

Output columns: transitions so far in this piece, a second, requests, lost, wrong, blocks copied, memory beside weights
and KV cache (MiB), of that what the allocator has given out, Python objects.
Last stdout line: one JSON document, of all pieces in --out. Exit status 1 if anything is lost or wrong, or if what was
broken was not found.

    python tests/stress/check_transitions.py --out DIR --transitions 25000 --minutes 13
    python tests/stress/check_transitions.py --out DIR --ranks 2 --transitions 10000
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]

from morphserve.tools.soak import GIVEN_UP, Ask, Books, draw_burst, make_model  # noqa: E402
from morphserve.tools.workload import OK, Outcome  # noqa: E402
from policies import Decision, Signals  # noqa: E402

_LIVE = 5  # requests: level 0's blocks hold them at their longest, so that every way back finds room
_BLOCKS, _BLOCK_TOKENS, _MAX_TOKENS = 64, 32, 512
_EVERY = 1000  # transitions between two looks at an empty engine
_EVERY_S = 60.0  # or so long, where they are slow
_PROOF = 300  # transitions with something broken
_STUCK_STEPS = 5_000  # without a request that ends
_SETTINGS = {
    "ladder": {
        "order": "front_to_back",
        "steps": [{"format": fmt, "layers_per_level": 1, "optional": True} for fmt in ("w8", "w4")],
    },
    "transition": {"max_layers_per_step": 1, "max_pause_ms": 1e6, "backoff_s": 0.1, "backoff_max_s": 0.2},
}


class Wander:
    """A policy: up and down by turns, mostly to the next level, and off again as soon as it is there."""

    predictions = None

    def __init__(self, deepest: int, draw: random.Random) -> None:
        self.max_level = deepest
        self._draw = draw
        self._target = 0
        self._goes_down = True

    def decide(self, signals: Signals) -> Decision:
        changes_its_mind = self._draw.random() < 0.005
        if signals.level == self._target or changes_its_mind:
            self._turn(signals.level)
        return Decision(self._target, "wander")

    def _turn(self, level: int) -> None:
        self._goes_down = level == 0 or (level < self.max_level and not self._goes_down)
        far = self._draw.random() < 0.1
        if self._goes_down:
            self._target = self._draw.randint(level + 1, self.max_level) if far else level + 1
        else:
            self._target = self._draw.randint(0, level - 1) if far else level - 1


class Drive:
    """An engine, its live requests, and the books."""

    def __init__(self, engine: Any, draw: random.Random, is_known: bool) -> None:
        self.engine = engine
        self.books = Books() if is_known else Books(expected=None)
        self.worst_off = 0.0
        self.num_copied = 0
        self.forgets_one = False  # on purpose, to see that it is missed
        self.num_changed = 0  # looks at the empty engine that differed
        self._draw = draw
        self._asks: dict[str, Ask] = {}
        self._coming: list[Ask] = []
        self._num_added = 0
        self._to_abort: dict[str, int] = {}  # name |-> steps it has left
        self._quiet_steps = 0
        self._first: dict[int, Any] = {}
        self._policy = Wander(len(engine.ladder) - 1, draw)
        self.num_committed = 0  # transitions, all of them beside live requests
        self.other_mib = self.heap_mib = 0.0
        self.num_objects = 0  # that Python's collector knows of
        self._count_copies()

    def _count_copies(self) -> None:
        pool = self.engine.morph.pool
        advance = pool.advance_shrink

        def counted(max_copies: int) -> Any:
            step = advance(max_copies)
            self.num_copied += len(step.copies)
            return step

        pool.advance_shrink = counted

    @property
    def transitions(self) -> Counter[str]:
        return Counter(self.engine.morph.status()["transitions"])

    def _committed(self) -> int:
        counted = self.engine.morph.controller.counters.transitions
        return sum(count for (_, outcome), count in counted.items() if outcome == "committed")

    def go(self, count: int) -> None:
        """Make so many transitions more under load, or what a minute brings; then end all requests."""
        morph = self.engine.morph
        morph.controller.replace_policy(self._policy, "wandering", morph.setup)
        begin = self._committed()
        until_s = time.monotonic() + _EVERY_S
        while self._committed() < begin + count and time.monotonic() < until_s and not morph.controller.failed:
            self._fill()
            self._step()
        while self._asks and self._quiet_steps < _STUCK_STEPS:
            self._step()
        for name, ask in list(self._asks.items()):  # what never ended
            self.books.enter(ask, Outcome(0, 0.0, len(ask.prompt), ask.num_tokens, error="never ended"))
            del self._asks[name]
        self.num_committed += self._committed() - begin

    def _fill(self) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        while len(self._asks) < _LIVE:
            if not self._coming:
                self._coming = draw_burst(self._draw)
            ask = self._coming.pop()
            name = str(self._num_added)
            self._num_added += 1
            params = SamplingParams(
                temperature=0.0, max_tokens=ask.num_tokens, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            self.engine.engine.add_request(name, {"prompt_token_ids": list(ask.prompt)}, params)
            self._asks[name] = ask
            if ask.kind == GIVEN_UP:
                self._to_abort[name] = self._draw.randrange(1, 60)

    def _step(self) -> None:
        self._quiet_steps += 1
        for output in self.engine.engine.step():
            if output.finished:
                self._book(output)
        for name in [name for name, left in self._to_abort.items() if left == 0]:
            del self._to_abort[name]
            if (ask := self._asks.pop(name, None)) is not None:
                self.engine.engine.abort_request([name])
                self.books.enter(ask, Outcome(0, 0.0, len(ask.prompt), ask.num_tokens))
        for name in self._to_abort:
            self._to_abort[name] -= 1

    def _book(self, output: Any) -> None:
        self._quiet_steps = 0
        ask = self._asks.pop(output.request_id)
        if self.forgets_one and self._asks:
            self.forgets_one = False
            forgotten = next(name for name, ask in self._asks.items() if ask.kind != GIVEN_UP)
            self.engine.engine.abort_request([forgotten])
        tokens = list(output.outputs[0].token_ids)
        outcome = Outcome(0, 0.0, len(ask.prompt), ask.num_tokens, token_ids=tokens, output_tokens=len(tokens))
        if output.outputs[0].finish_reason == "length" and len(tokens) == ask.num_tokens:
            outcome.status = OK
        else:
            outcome.error = f"ended as {output.outputs[0].finish_reason}"
        self.books.enter(ask, outcome)

    def look(self) -> None:
        """Ask the empty engine at level 0 and at two others, and hold what it says against the first time."""
        deepest = len(self.engine.ladder) - 1
        levels = range(deepest + 1) if not self._first else sorted({0, *self._draw.sample(range(1, deepest + 1), 2)})
        for level in reversed(levels):  # level 0 last
            self.engine.set_level(level)
            self.engine.llm.reset_prefix_cache()
            seen = _fingerprint(self.engine.llm)
            if self._first.setdefault(level, seen) != seen:
                self.num_changed += 1
        self.engine.llm.reset_prefix_cache()
        memory, morph = self.engine.memory(), self.engine.morph
        published = morph.pool.num_kv_blocks * morph.runtime.kv_block_bytes
        self.worst_off = max(self.worst_off, abs(memory["kv_resident_bytes"] / published - 1))
        self.other_mib = (memory["anonymous"] - memory["weight_bytes"] - memory["kv_resident_bytes"]) / 2**20
        gc.collect()
        self.num_objects, self.heap_mib = len(gc.get_objects()), _heap_bytes() / 2**20


def _heap_bytes() -> int:
    """Return what the allocator of this process has given out and not got back: no fragments, no free lists."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


class _MallInfo(ctypes.Structure):
    _fields_: ClassVar = [
        *((f"unused_{i}", ctypes.c_size_t) for i in range(4)),
        *((name, ctypes.c_size_t) for name in ("hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def _fingerprint(llm: Any) -> list[Any]:
    from vllm import SamplingParams

    draw = random.Random(3)
    prompts = [{"prompt_token_ids": [draw.randrange(3, 128) for _ in range(n)]} for n in (130, 150, 190, 260)]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False, logprobs=1)
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        completion = output.outputs[0]
        steps = zip(completion.token_ids, completion.logprobs, strict=True)
        found.append([(token, step[token].logprob) for token, step in steps])
    return found


def _start(args: argparse.Namespace) -> Any:
    from morphserve.integration.offline import LevelEngine

    model = args.out / f"model-{args.model}"
    if not (model / "model.safetensors").exists():
        if args.model == "random":
            from engine.rank_harness import make_model as make_random

            make_random(model)
        else:
            make_model(model)
    ranks: dict[str, Any] = {}
    if args.ranks > 1:
        ranks = {"tensor_parallel_size": args.ranks, "distributed_executor_backend": "mp"}
    return LevelEngine(
        str(model), {**_SETTINGS, "cache_dir": str(args.out / "cache")}, enforce_eager=True, max_num_seqs=16,
        num_gpu_blocks_override=_BLOCKS, block_size=_BLOCK_TOKENS, max_model_len=_MAX_TOKENS, disable_log_stats=True,
        enable_prefix_caching=True, skip_tokenizer_init=True, **ranks,
    )  # fmt: skip


def _piece(args: argparse.Namespace, number: int) -> None:
    """Run one engine until its transitions or its minutes are over; a row at each look."""
    begin = time.monotonic()
    draw = random.Random(args.seed + number)
    with _start(args) as engine, (args.out / "rows.jsonl").open("a", encoding="utf-8") as rows:
        drive = Drive(engine, draw, args.model == "recall")
        drive.look()
        wandering_s = 0.0
        while drive.num_committed < args.transitions and time.monotonic() - begin < 60 * args.minutes:
            before = time.monotonic()
            drive.go(min(_EVERY, args.transitions - drive.num_committed))
            wandering_s += time.monotonic() - before
            drive.look()
            row = _row(args, number, drive, wandering_s)
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            columns = (row["committed"], row["per_s"], row["sent"], row["lost"], row["wrong"], row["copied"])
            memory = (round(row["other_mib"], 2), round(row["heap_mib"], 2), row["objects"])
            print(*columns, *memory, sep="  ", flush=True)
            if engine.morph.controller.failed:
                return
        # What is on the ranks can be broken from here where the one rank is this process.
        breaks = ("request", *(("copy", "rewrite_block_tables") if args.ranks == 1 and args.model == "recall" else ()))
        rows.write(json.dumps({**row, "found": _prove(drive, breaks)}) + "\n")


def _row(args: argparse.Namespace, number: int, drive: Drive, seconds: float) -> dict[str, Any]:
    status = drive.engine.morph.status()
    books = drive.books.as_json()
    return {
        "piece": number, "model": args.model, "ranks": args.ranks, "found": None,
        "committed": drive.num_committed, "transitions": dict(drive.transitions), "seconds": round(seconds, 1),
        "per_s": round(drive.num_committed / seconds, 1), "steps": sum(status["controller_time"]["counts"]),
        **{key: books[key] for key in ("sent", "answered", "given_up", "lost", "wrong", "tokens", "faults")},
        "looks_changed": drive.num_changed, "copied": drive.num_copied, "kv_resident_off_worst": drive.worst_off,
        "other_mib": drive.other_mib, "heap_mib": drive.heap_mib, "objects": drive.num_objects,
        "errors": status["errors"], "failed": bool(status["failed"]),
        "layers_switched": status["counters"]["num_layers_switched"],
    }  # fmt: skip


def _prove(drive: Drive, breaks: tuple[str, ...]) -> dict[str, int]:
    """Break one thing after the other, and return how many requests were lost or wrong by it."""
    found = {}
    kept, expected = drive.books, drive.books.expected
    for what in breaks:
        drive.books = Books(expected=expected)
        with _broken(what, drive):
            drive.go(_PROOF)
        found[what] = drive.books.lost + drive.books.wrong
        drive.engine.llm.reset_prefix_cache()
    drive.books = kept
    return found


@contextmanager
def _broken(what: str, drive: Drive) -> Iterator[None]:
    """Have the rank skip something, or the engine forget a request."""
    from morphserve.integration.worker.kv import RankKV

    if what != "request":
        right = getattr(RankKV, what)
        setattr(RankKV, what, lambda self, *args, **kwargs: None)
        try:
            yield
        finally:
            setattr(RankKV, what, right)
        return
    drive.forgets_one = True
    yield


def _last_rows(out: Path) -> Iterator[dict[str, Any]]:
    last: dict[int, dict[str, Any]] = {}
    if (out / "rows.jsonl").exists():
        for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            last[row["piece"]] = row
    yield from last.values()


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the last rows of all pieces, by model and ranks."""
    found: dict[str, Any] = {}
    summed = ("committed", "seconds", "steps", "sent", "answered", "given_up", "lost", "wrong", "tokens")
    for row in rows:
        key = f"{row['model']}, ranks {row['ranks']}"
        new = {"pieces": 0, "transitions": Counter(), "errors": Counter(), "faults": [], "found": []}
        part = found.setdefault(key, new)
        part["pieces"] += 1
        for name in (*summed, "looks_changed", "copied", "layers_switched"):
            part[name] = part.get(name, 0) + row[name]
        part["transitions"].update(row["transitions"])
        part["errors"].update(row["errors"])
        part["faults"] += row["faults"][:3]
        part["found"].append(row.get("found"))
        part["kv_resident_off_worst"] = max(part.get("kv_resident_off_worst", 0.0), row["kv_resident_off_worst"])
        part["failed"] = part.get("failed", False) or row["failed"]
        part["per_s"] = round(part["committed"] / max(part["seconds"], 1e-9), 1)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--transitions", type=int, default=25_000, help="of this piece; 0 = only add up")
    parser.add_argument("--minutes", type=float, default=13.0, help="that this piece may take")
    parser.add_argument("--model", choices=("recall", "random"), default="recall")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")  # read as torch is loaded, with the engine
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.INFO)  # two lines a transition
    if args.transitions:
        _piece(args, len(list(_last_rows(args.out))))
    document = total(list(_last_rows(args.out)))
    print(json.dumps(document))
    bad = ("lost", "wrong", "looks_changed", "failed")
    missed = any(not all(found.values()) for part in document.values() for found in part["found"] if found)
    return int(missed or any(part[name] for part in document.values() for name in bad))


if __name__ == "__main__":
    sys.exit(main())
