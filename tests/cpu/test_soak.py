"""What `morphserve soak` calls wrong: each thing that must hold, not holding once; and its model of known answers."""

from __future__ import annotations

import asyncio
import copy
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from morphserve.config import MorphServeConfig
from morphserve.errors import MorphServeError
from morphserve.tools.bench import ClientOptions
from morphserve.tools.soak import answer, make_model, run
from morphserve.tools.soak.judge import report
from morphserve.tools.soak.load import GIVEN_UP, WHOLE, Ask, Books, Client, draw_burst
from morphserve.tools.soak.recall import DISTANCE, NUM_TOKENS
from morphserve.tools.soak.trend import Slope, percentile, slope
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


def test_a_short_prompt_says_nothing() -> None:
    """Guards: answers that are guessed at where the model would have looked before the beginning."""
    with pytest.raises(AssertionError, match="more than 125 are needed"):
        answer(_prompt(0, DISTANCE), 1)


def _end(ask: Ask, tokens: list[int] | None = None, error: str = "") -> Outcome:
    outcome = Outcome(0, 0.0, len(ask.prompt), ask.num_tokens, error=error)
    if tokens is not None:
        outcome.status, outcome.token_ids, outcome.output_tokens = OK, tokens, len(tokens)
    return outcome


def test_every_request_is_booked_once() -> None:
    """Guards: a request that was lost, cut or answered wrongly and is in no count."""
    asks = draw_burst(random.Random(1))
    right = [answer(ask.prompt, ask.num_tokens) for ask in asks]
    books = Books()
    for ask, tokens in zip(asks, right, strict=True):
        books.enter(ask, _end(ask, tokens))
    assert (books.sent, books.answered, books.tokens) == (16, 16, sum(map(len, right)))
    assert not books.faults
    wrong = [*right[0][:-1], (right[0][-1] + 1) % NUM_TOKENS]
    books.enter(asks[0], _end(asks[0], wrong))
    books.enter(asks[1], _end(asks[1], error="the stream ended after 3 of 9 tokens"))
    leaver = next(ask for ask in asks if ask.kind == GIVEN_UP)
    books.enter(leaver, _end(leaver))
    books.enter(leaver, _end(leaver, error="ServerDisconnectedError"))
    assert (books.sent, books.answered, books.lost, books.wrong, books.given_up) == (20, 17, 2, 1, 1)
    assert [fault.split(":")[0] for fault in books.faults] == ["wrong", "lost", "lost"]
    for _ in range(100):
        books.enter(asks[1], _end(asks[1], error="gone"))
    assert books.lost == 102 and len(books.faults) == 20, "hours of a dead server would fill the memory"


class _Session:
    """Answers a request with one document, or none."""

    def __init__(self, status: int, document: Any) -> None:
        self.status, self._document = status, document

    def post(self, url: str, json: Any) -> _Session:
        return self

    async def __aenter__(self) -> _Session:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def json(self) -> Any:
        if isinstance(self._document, Exception):
            raise self._document
        return self._document


@pytest.mark.parametrize(
    ("status", "cut", "lost"),
    [(200, None, ""), (200, 8, "the answer was cut"), (500, None, "http_500"), (200, OSError("reset"), "OSError")],
)
def test_an_answer_in_one_piece_is_booked_as_it_came(status: int, cut: Any, lost: str) -> None:
    """Guards: an answer that was cut, refused or never came, and counts as answered."""
    ask = Ask(tuple(_prompt(4)), 9, WHOLE)
    tokens = answer(ask.prompt, 9)[:cut] if isinstance(cut, int | None) else []
    receipt = {"output_tokens": {"0": 9}, "computed_tokens": {"0": 145}, "reused_tokens": {}}
    document = {"choices": [{"token_ids": tokens}], "kv_transfer_params": {"morphserve": receipt}}
    session: Any = _Session(status, cut if isinstance(cut, Exception) else document)
    client = Client(session, ClientOptions("http://127.0.0.1:1", "m"))
    asyncio.run(client.burst([ask]))
    books = client.books
    assert (books.sent, books.answered, books.lost, books.wrong) == (1, int(not lost), int(bool(lost)), 0)
    assert lost in "".join(books.faults) and books.receipts == ({} if lost else {"0": 1})


@pytest.mark.parametrize(("output", "wrong"), [({"0": 5, "3": 4}, 0), ({"0": 5, "3": 5}, 1), ({}, 1)])
def test_a_receipt_is_of_its_answer(output: dict[str, int], wrong: int) -> None:
    """Guards: receipts that count other tokens than those that came."""
    ask = Ask(tuple(_prompt(2)), 9)
    books = Books()
    receipt = {"output_tokens": output, "computed_tokens": {"0": 100}, "reused_tokens": {}}
    books.enter(ask, _end(ask, answer(ask.prompt, 9)), receipt)
    assert books.wrong == wrong
    assert sum(books.receipts.values()) == 1


def test_a_slope_knows_how_sure_it_is() -> None:
    """Guards: noise that is called a leak, and a leak that drowns in noise."""
    draw = random.Random(0)
    leak = [(60.0 * i, 500 + 3.0 * i / 60 + draw.gauss(0, 0.5)) for i in range(60)]
    flat = [(60.0 * i, 500 + draw.gauss(0, 0.5)) for i in range(60)]
    found, stock = slope(leak), slope(flat)
    assert found is not None and stock is not None
    beyond = found.beyond(stock)
    assert abs(beyond.per_hour - 3.0) < 3 * beyond.error and 0.1 < beyond.error < 0.6
    assert abs(stock.per_hour) < 3 * stock.error
    assert slope(leak[:2]) is None and slope([(5.0, 1.0)] * 4) is None


def test_a_difference_is_no_surer_than_its_parts() -> None:
    """Guards: a growth beyond stock's that is all noise of the stock server."""
    found = Slope(3.0, 0.3, 40).beyond(Slope(1.0, 0.4, 30))
    assert (found.per_hour, found.num_samples) == (2.0, 30) and found.error == pytest.approx(0.5)


def test_percentiles_lie_in_their_bucket() -> None:
    """Guards: a 99th percentile of a bucket that nothing fell into, and one without an upper edge."""
    edges = (1.0, 2.0, 4.0)
    assert percentile(edges, [50, 0, 50, 0], 0.99) == pytest.approx(3.96)
    assert percentile(edges, [0, 10, 0, 0], 0.5) == pytest.approx(1.5)
    assert percentile(edges, [0, 0, 0, 7], 0.99) == 4.0
    assert percentile(edges, [0, 0, 0, 0], 0.99) is None


def test_a_server_that_has_ended_ends_the_run(tmp_path: Path) -> None:
    """Guards: hours of errors of a server that is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    side: Any = SimpleNamespace(server=SimpleNamespace(pid=gone.pid), client=None)
    soak = run._Soak(run.Plan(tmp_path, minutes=1.0), {"morphserve": side}, None)
    with pytest.raises(MorphServeError, match="the server morphserve ended after 0 min"):
        asyncio.run(soak.run())


def test_a_row_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """Guards: a traceback in a look at a run that is under way."""
    (tmp_path / run.SAMPLES).write_text('{"t_s": 1}\n{"t_s": ')
    assert list(run.read_rows(tmp_path)) == [{"t_s": 1}]


def _status(minute: int) -> dict[str, Any]:
    return {
        "level": 0, "num_kv_blocks": 64, "mapped_kv_blocks": 64, "num_running": 0, "num_waiting": 0, "failed": False,
        "transitions": {"degrade_committed": 10 * minute}, "transition_seconds": 0.1 * minute, "errors": {},
        "tokens_by_level": {"0": 5}, "pause_ms": {"p50": 1.0, "max": 2.0},
        "controller_time": {
            "edges_s": [1e-5, 1e-4, 1e-3], "counts": [990 * minute, 10 * minute, 0, 0], "sum_s": 0.01 * minute
        },
    }  # fmt: skip


def good() -> list[dict[str, Any]]:
    """Forty minutes in which nothing grew and every answer was right."""
    rows: list[dict[str, Any]] = []
    for minute in range(41):
        for side in ("morphserve", "stock"):
            processes = [
                {
                    "role": role, "pid": 1, "rss_kib": 400_000 + minute % 3, "anonymous_kib": 200_000, "num_fds": 30,
                    "num_threads": 9, "cpu_s": 20.0 * minute,
                }
                for role in ("api", "core")
            ]  # fmt: skip
            counts = {"sent": 32 * minute, "answered": 30 * minute, "given_up": 2 * minute, "lost": 0, "wrong": 0}
            row = {"t_s": 60.0 * minute, "side": side, "processes": processes, **counts, "tokens": 1, "receipts": {}}
            rows.append({**row, "faults": [], **({"status": _status(minute)} if side == "morphserve" else {})})
    return [*rows, {"end": True, "left_over": []}]


def _each(rows: list[dict[str, Any]], change: Callable[[dict[str, Any]], None], side: str = "morphserve") -> None:
    for row in rows:
        if row.get("side") == side:
            change(row)


def _leaks(rows: list[dict[str, Any]]) -> None:
    _each(rows, lambda row: row["processes"][1].update(rss_kib=400_000 + int(row["t_s"])))  # 3.5 MiB an hour


def _loses(rows: list[dict[str, Any]]) -> None:
    rows[-3].update(lost=1, answered=rows[-3]["answered"] - 1, faults=["lost: error, 3 of 9 tokens"])


def _errs(rows: list[dict[str, Any]]) -> None:
    rows[-3].update(wrong=1, faults=["wrong: 1 of 9 tokens, the first at 8, 9 came"])


def _forgets(rows: list[dict[str, Any]]) -> None:
    rows[-3].update(answered=rows[-3]["answered"] - 1)


def _opens(rows: list[dict[str, Any]]) -> None:
    rows[-3]["processes"][0]["num_fds"] = 31


def _slows(rows: list[dict[str, Any]]) -> None:
    for row in rows[60:]:
        if row.get("status"):
            row["status"]["controller_time"]["counts"][2] += int(row["t_s"])


def _stalls(rows: list[dict[str, Any]]) -> None:
    _each(rows, lambda row: row["status"]["controller_time"].update(counts=[0, 0, 0, int(row["t_s"])]))


def _says(**more: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[-3]["status"].update(more)


def _goes_silent(rows: list[dict[str, Any]]) -> None:
    rows[-3]["status"] = None


def _may_leak(rows: list[dict[str, Any]]) -> None:
    """0.8 MiB an hour is allowed; of what scatters so much nobody can say that it is no more."""
    _each(rows, lambda row: row["processes"][1].update(
        rss_kib=int(400_000 + 0.23 * row["t_s"] + 300 * (-1) ** (row["t_s"] // 60))
    ))  # fmt: skip


def _orphans(rows: list[dict[str, Any]]) -> None:
    rows[-1]["left_over"] = ["VLLM::EngineCore"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_leaks, "rss grows by 3.5"),
        (_may_leak, "rss grows by 0.8"),
        (_loses, "1 lost, 0 wrong of 1280: lost: error"),
        (_errs, "0 lost, 1 wrong"),
        (_forgets, "the books do not add up"),
        (_opens, "morphserve api: 31 open files, 30 in the first half"),
        (_slows, "99th percentile was 10.0 us in the first quarter, "),
        (_stalls, "nobody knows whether it grew"),
        (_says(level=2), "at rest, at 2400 s: not at level 0"),
        (_says(failed=True), "the controller has failed"),
        (_says(num_running=1), "requests are left"),
        (_says(num_waiting=1), "requests are left"),
        (_goes_silent, "no status at 2400 s"),
        (_says(num_kv_blocks=65), "more blocks published than mapped"),
        (_says(num_kv_blocks=63), "at rest there were [63, 64] blocks"),
        (_orphans, "1 processes outlived"),
    ],
)
def test_each_thing_that_must_hold_is_looked_at(change: Callable[[Any], None], words: str) -> None:
    """Guards: a soak that is green whatever the server does."""
    rows = good()
    assert report(rows, 20.0)["violations"] == []
    changed = copy.deepcopy(rows)
    change(changed)
    violations = report(changed, 20.0)["violations"]
    assert any(words in violation for violation in violations), violations


def test_a_warm_up_is_no_leak() -> None:
    """Guards: a verdict on what a server takes once, when its first requests come."""
    rows = good()
    _each(rows, lambda row: row["processes"][1].update(rss_kib=400_000 + min(int(row["t_s"]), 900)))
    assert report(rows, 20.0)["violations"] == []


def test_memory_that_stands_still_needs_no_stock() -> None:
    """Guards: a verdict on how much a stock server's memory scatters."""
    rows = good()
    _each(rows, lambda row: row["processes"][1].update(rss_kib=400_000 + 9999 * (int(row["t_s"]) // 60 % 7)), "stock")
    assert report(rows, 20.0)["violations"] == []


def test_what_stock_grows_by_too_is_not_ours() -> None:
    """Guards: a verdict on vLLM's own growth."""
    rows = good()
    for side in ("morphserve", "stock"):
        _each(rows, lambda row: row["processes"][1].update(rss_kib=400_000 + int(row["t_s"])), side)
    assert report(rows, 20.0)["violations"] == []


@pytest.mark.parametrize("kind", run.POLICIES)
def test_the_settings_of_a_soak_are_taken(kind: str, tmp_path: Path) -> None:
    """Guards: an hour that ends in its first second, at a setting that has another name since."""
    plan = run.Plan(tmp_path, minutes=1.0, kind=kind)
    config = MorphServeConfig.model_validate(run.settings(plan))
    assert config.policy.kind == kind and config.cache_dir == tmp_path / "cache"
