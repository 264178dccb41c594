"""Tasks through a live server: which items are asked, how two runs are compared, what passes the relay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import live_tasks
import pytest
from aiohttp import web
from live_items import ANSWER, compare, doubts, make_tasks, read_answers, share_below, status_change, task_file
from live_traffic import Relay, keep_loaded, run_lm_eval

from morphserve.errors import MorphServeError

pytestmark = pytest.mark.cpu


def encode(text: str, special: bool) -> list[int]:
    """One token a word."""
    return [sum(map(ord, word)) for word in text.split()]


def words(num: int, salt: str) -> str:
    """Return text of so many different words."""
    return " ".join(f"{salt}word" + "abcdefghij"[i % 10] * (1 + i // 10) for i in range(num))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory as published, in small."""
    for name in ("wikitext2", "qmsum", "gsm8k"):
        (tmp_path / name).mkdir()
    lines = [f" {words(60 + i, 'w')} " for i in range(6)] + [" = Title = ", f"{words(70, 'x')} <unk> {words(20, 'y')}"]
    (tmp_path / "wikitext2/test.txt").write_text("\n".join(lines), encoding="utf-8")
    turns = [{"speaker": "A", "content": f"{{vocalsound}} {words(120, 'q')}"}, {"speaker": "B", "content": "Yes."}]
    meetings = json.dumps({"meeting_transcripts": turns})
    (tmp_path / "qmsum/test.jsonl").write_text(f"{meetings}\n{meetings}\n", encoding="utf-8")
    problems = [
        {
            "question": f"What is {i} plus {i}?",
            "answer": f"{words(i + 1, 's')} {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### 1,{i:03}",
        }
        for i in range(10)
    ]
    (tmp_path / "gsm8k/test.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems), encoding="utf-8")
    return tmp_path


def test_items_are_within_bounds(data: Path) -> None:
    """Guards: passages too short to tell anything or cut off by the server, a word that its context has in part."""
    tasks = make_tasks(data, encode, limit=5, answers=4, max_model_len=512)
    assert {task: len(items) for task, items in tasks.items()} == {
        "cloze_wikitext": 5, "cloze_qmsum": 2, "gsm8k_solution": 5, ANSWER: 4,
    }  # fmt: skip
    for item in tasks["cloze_wikitext"] + tasks["cloze_qmsum"]:
        assert 48 <= len(encode(item["context"], False)) <= 96
        assert item["target"].startswith(" ") and item["target"].strip().isalpha() and item["context"][-1] != " "
        assert "<unk>" not in item["context"] and "{" not in item["context"]
    for item in tasks["gsm8k_solution"]:
        assert "<<" not in item["target"] and item["target"].endswith(f"\nThe answer is {item['target'].split()[-1]}")


def test_no_question_is_asked_whose_answer_is_shown(data: Path) -> None:
    """Guards: an example in the prompt that is also an item, whose answer can be copied."""
    tasks = make_tasks(data, encode, limit=10, answers=10, max_model_len=512)
    questions = [item["context"].rsplit("Question: ", 1)[1] for item in tasks[ANSWER]]
    assert len(questions) == len(set(questions)) == 8
    for item in tasks[ANSWER]:
        shown = [part for part in item["context"].split("Question: ") if "The answer is" in part]
        assert len(shown) == 2 and not any(part.startswith(q[:15]) for part in shown for q in questions)
        assert item["target"].isdecimal()  # 1,004 as 1004: numbers are compared without commas


def test_what_does_not_fit_is_not_asked(data: Path) -> None:
    """Guards: items whose beginning lm-eval cuts off, without a word in the report."""
    tasks = make_tasks(data, encode, limit=10, answers=10, max_model_len=200)
    assert all(len(encode(item["context"], False)) + 160 < 199 for item in tasks[ANSWER])
    with pytest.raises(MorphServeError, match="no items for gsm8k_answer that fit --max-model-len 165"):
        make_tasks(data, encode, limit=10, answers=10, max_model_len=165)


@pytest.mark.parametrize("name", ["wikitext2/test.txt", "qmsum/test.jsonl", "gsm8k/test.jsonl"])
def test_a_directory_of_other_data_is_named(data: Path, name: str) -> None:
    """Guards: a traceback, or tasks of whatever was there."""
    (data / name).unlink()
    with pytest.raises(MorphServeError, match=r"--data .*No such file.*Give a directory with wikitext2/test.txt"):
        make_tasks(data, encode, 5, 4, 512)
    (data / name).write_text('{"other": 1}\n', encoding="utf-8")
    with pytest.raises(MorphServeError, match="--data"):
        make_tasks(data, encode, 5, 4, 512)


def test_passages_that_profiles_were_made_on_are_not_asked(data: Path) -> None:
    """Guards: quality measured on the text by which layers were chosen, told apart by its spaces alone."""
    (data / "wikitext2/test.txt").write_text("\n".join(words(70, salt) for salt in "uvw"), encoding="utf-8")
    first, *others = make_tasks(data, encode, 50, 4, 512)["cloze_wikitext"]
    known = f"Before. {first['context'].replace(' ', ' , ').upper()} Behind."
    left = make_tasks(data, encode, 50, 4, 512, known)["cloze_wikitext"]
    assert [each["context"] for each in left] == [each["context"] for each in others]


def item(number: int, right: bool, loglik: float, num_tokens: int = 1, **levels: int) -> dict[str, Any]:
    """Return an answered item; `l2=5`: five of its tokens at level 2."""
    told = {name[1:]: count for name, count in levels.items()}
    return {"id": number, "right": right, "loglik": loglik, "num_tokens": num_tokens, "levels": told}


def test_items_are_held_against_themselves() -> None:
    """Guards: a difference of means, whose error is that between items, many times that of the pairs."""
    stock = [item(0, True, -1.0), item(1, False, -40.0, 10), item(2, True, -3.0), item(3, False, -8.0, 2)]
    run = [item(0, True, -1.1, 1, l0=50), item(1, False, -42.0, 10, l2=60), item(2, False, -3.3, 1, l0=10, l1=30),
           item(3, True, -8.0, 2, l0=50)]  # fmt: skip
    paired = compare(stock, run)
    assert paired["difference"] == pytest.approx(-(0.1 + 0.2 + 0.3 + 0.0) / 4)
    assert paired["standard_error"] == pytest.approx(0.12910 / 2, rel=1e-3)
    assert (paired["lost"], paired["won"]) == (1, 1)
    assert paired["below"] == pytest.approx(90 / 200)
    assert paired["levels"] == {"0": 110, "1": 30, "2": 60}
    # Of those that full precision computed altogether.
    assert paired["at_full_precision"] == {"items": 2, "most": pytest.approx(0.1)}


def test_items_of_another_run_are_refused() -> None:
    """Guards: pairs of two different items, where one run was asked more."""
    with pytest.raises(MorphServeError, match="other items"):
        compare([item(0, True, -1.0), item(1, True, -1.0)], [item(1, True, -1.0), item(0, True, -1.0)])


def test_generated_answers_have_no_log_probability() -> None:
    """Guards: an error, or a 0 that reads as `no difference`, where nothing was measured."""
    stock = [{"id": i, "right": i == 0, "answer": "7", "levels": {}} for i in range(3)]
    run = [{"id": i, "right": i != 0, "answer": "789"[i], "levels": {"3": 10}} for i in range(3)]
    paired = compare(stock, run)
    assert paired["difference"] is None and paired["standard_error"] is None
    assert (paired["lost"], paired["won"], paired["other_answer"], paired["below"]) == (1, 2, 2, 1.0)


def status(*tokens: int, degrade: int = 0, restore: int = 0) -> dict[str, Any]:
    """Return the part of a status that is read, of a server that has generated so many tokens at each level."""
    ended = {"degrade_committed": degrade, "restore_committed": restore}
    return {"tokens_by_level": {str(i): n for i, n in enumerate(tokens)}, "transitions": ended}


def test_shares_are_of_the_time_between() -> None:
    """Guards: tokens of the task before, or of a server's whole life, in a task's share."""
    between = status_change(status(100, 50, degrade=3, restore=2), status(130, 60, 60, degrade=5, restore=2))
    assert between["tokens_by_level"] == {"0": 30, "1": 10, "2": 60}
    assert between["transitions"] == {"degrade_committed": 2, "restore_committed": 0}
    assert share_below(between["tokens_by_level"]) == pytest.approx(0.7)
    assert status_change({}, {}) == {"tokens_by_level": {}, "transitions": {}} and share_below({}) is None  # stock


@pytest.mark.parametrize(
    ("name", "served", "level", "said"),
    [
        ("stock", [status_change({}, {})], 0, ""),
        ("slo", [status_change({}, status(90, 0)), status_change({}, status(90, 10, degrade=1, restore=1))], 0, ""),
        ("slo", [status_change({}, status(90, 10, degrade=1))], 0, ""),  # after the load
        ("slo", [status_change({}, status(90, 0))] * 2, 0, "slo: never left level 0"),
        ("slo", [status_change({}, status(0, 90, degrade=1))], 3, "slo: never restored a layer"),
        ("slo", [status_change({}, status(0, 90, degrade=2, restore=1))], 3, "slo: at level 3 a minute after the load"),
        ("slo", [status_change({}, status(50, 90, degrade=2, restore=2))], None, "slo: stopped before"),
        ("static_w8", [status_change({}, status(0, 90))], 1, ""),
        ("static_w8", [status_change({}, status(0, 90)), status_change({}, status(2, 9))], 1, "static_w8: generated 2"),
    ],
)
def test_a_server_that_did_not_switch_is_told(name: str, served: list[Any], level: int | None, said: str) -> None:
    """Guards: `no loss while it switches` of a server that never did."""
    found = doubts(name, served, level)
    assert len(found) == bool(said) and all(line.startswith(said) for line in found)


def test_answers_are_read_as_lm_eval_writes_them(tmp_path: Path) -> None:
    """Guards: an item's levels taken for another's, or tokens of its context counted as its target's."""
    out = tmp_path / "name__of__model"
    out.mkdir()
    docs: list[dict[str, Any]] = [{"id": i, "context": f"one two {i}", "target": f" three{i} four"} for i in range(2)]
    told = {"cloze_qmsum": {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "perplexity,none": 9.0}}
    (out / "results_2.json").write_text(json.dumps({"results": told}), encoding="utf-8")
    rows = [{"doc": doc, "filtered_resps": [["-2.5", "True"]], "acc": float(doc["id"])} for doc in reversed(docs)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "samples_cloze_qmsum_2.jsonl").write_text(text, encoding="utf-8")
    prompt = tuple(encode("one two 1 three1 four", False))
    scores, answered = read_answers(tmp_path, "cloze_qmsum", encode, {prompt: {"1": 5}})
    assert scores == {"acc": 0.5, "perplexity": 9.0}
    assert [(each["id"], each["right"], each["num_tokens"], each["levels"]) for each in answered] == [
        (0, False, 2, {}), (1, True, 2, {"1": 5}),
    ]  # fmt: skip
    assert answered[0]["loglik"] == -2.5


def test_generated_answers_are_read_by_their_prompt(tmp_path: Path) -> None:
    """Guards: levels looked up by prompt and target, as of an item that was not generated."""
    told = {ANSWER: {"exact_match,last_number": 1.0, "exact_match_stderr,last_number": 0.1}}
    (tmp_path / "results_2.json").write_text(json.dumps({"results": told}), encoding="utf-8")
    row = {"doc": {"id": 0, "context": "a b", "target": "7"}, "filtered_resps": ["7"], "exact_match": 1.0}
    (tmp_path / f"samples_{ANSWER}_2.jsonl").write_text(json.dumps(row), encoding="utf-8")
    scores, (answered,) = read_answers(tmp_path, ANSWER, encode, {tuple(encode("a b", False)): {"0": 3}})
    assert scores == {"exact_match": 1.0}
    assert answered["right"] and answered["answer"] == "7" and answered["levels"] == {"0": 3}


def test_tasks_are_of_their_kind() -> None:
    """Guards: a generated answer judged by a number in the middle of it, or one that runs into the next question."""
    generated, scored = task_file(ANSWER, Path("/x")), task_file("cloze_qmsum", Path("/x"))
    assert generated["output_type"] == "generate_until" and scored["output_type"] == "loglikelihood"
    (steps,) = (each["filter"] for each in generated["filter_list"])
    assert steps[0]["group_select"] == -1 and "\n\n" in generated["generation_kwargs"]["until"]
    assert generated["generation_kwargs"]["temperature"] == 0


async def _through_relay(body: dict[str, Any], receipt: str | None) -> tuple[dict[str, Any], Any, Relay]:
    seen = {}

    async def answer(request: web.Request) -> web.Response:
        seen.update(await request.json())
        headers = {"X-MorphServe-Receipt": receipt} if receipt else {}
        return web.json_response({"choices": []}, headers=headers)

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        relay = Relay(f"http://127.0.0.1:{runner.addresses[0][1]}")
        async with relay.listening() as url, aiohttp.ClientSession() as session, session.post(url, json=body) as got:
            return seen, await got.json(), relay
    finally:
        await runner.cleanup()


def test_relay_leaves_out_the_seed_and_keeps_the_levels() -> None:
    """Guards: a seed that ends a server's worker; levels that nobody knows."""
    body = {"prompt": [[5, 6, 7]], "seed": 1234, "echo": True, "logprobs": 1, "max_tokens": 1}
    receipt = json.dumps({"computed_tokens": {"0": 1, "2": 2}})
    seen, answer, relay = asyncio.run(_through_relay(body, receipt))
    assert "seed" not in seen and seen["echo"] is True and seen["prompt"] == [[5, 6, 7]]
    assert seen["vllm_xargs"] == {"morphserve_receipt": 1} and answer == {"choices": []}
    assert relay.levels == {(5, 6, 7): {"0": 1, "2": 2}}
    assert asyncio.run(_through_relay(body, None))[2].levels == {}


def options(data: Path, *more: str) -> list[str]:
    """Return a command line that starts nothing before its options are read."""
    out = ["--model", str(data), "--out", str(data / "out"), "--workload", "convD", "--data", str(data)]
    return [*out, "--lm-eval", sys.executable, *more]


@pytest.mark.parametrize(
    ("script", "timeout_s", "said"),
    [
        ("raise SystemExit('no such model')", 60, "lm-eval ended with 1 and said last: no such model"),
        ("import time; time.sleep(60)", 0.5, "--task-timeout 0.5 s are over: raise it"),
    ],
)
def test_an_lm_eval_that_fails_or_hangs_is_told(tmp_path: Path, script: str, timeout_s: float, said: str) -> None:
    """Guards: a run that waits for ever, or goes on to the next task as if nothing was."""
    with pytest.raises(MorphServeError, match=said):
        asyncio.run(run_lm_eval([sys.executable, "-c", script], tmp_path, timeout_s))


@pytest.mark.parametrize(("rest_s", "least", "most"), [(0.0, 3, 99), (60.0, 1, 1), (None, 0, 0)])
def test_load_begins_again_whatever_became_of_it(
    monkeypatch: pytest.MonkeyPatch, rest_s: float | None, least: int, most: int
) -> None:
    """Guards: a load that waits for a server which is behind, or that goes on when the tasks are done."""
    begun, ended = [], []

    async def replay(*args: object) -> None:
        begun.append(args)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(args)

    async def some_time() -> None:
        what: Any = SimpleNamespace(workload=SimpleNamespace(span_s=0.02), prompts=[])
        loading = asyncio.create_task(keep_loaded(what, what, rest_s, Counter()))
        await asyncio.sleep(0.3)
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading

    monkeypatch.setattr("live_traffic.replay", replay)
    asyncio.run(some_time())
    assert least <= len(begun) <= most and len(ended) == len(begun)


def test_requests_cut_off_are_counted_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a load that counts those that were answered, and not those that the server starved."""
    ended: Counter[str] = Counter()

    async def replay(workload: Any, prompts: Any, client: Any, begin: float, on_done: Any) -> Any:
        outcomes = [SimpleNamespace(status="ok"), SimpleNamespace(status="cutoff")]
        on_done(outcomes[0])
        return SimpleNamespace(outcomes=outcomes)

    async def some_time() -> None:
        what: Any = SimpleNamespace(workload=SimpleNamespace(span_s=60.0), prompts=[])
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(keep_loaded(what, what, 0.0, ended), 0.1)

    monkeypatch.setattr("live_traffic.replay", replay)
    asyncio.run(some_time())
    assert ended == {"ok": 1, "cutoff": 1}


def test_what_is_missing_is_told_before_a_server_starts(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a traceback, or minutes of a server's start before it."""
    assert live_tasks.main(options(data, "--lm-eval", "no-such-lm-eval")) == 1
    assert "no-such-lm-eval: there is no such command. Install it" in capsys.readouterr().err
    assert live_tasks.main(options(data, "--without-load", "static_w8")) == 1
    assert "--without-load static_w8: choose from --compare stock." in capsys.readouterr().err


def test_results_of_other_items_are_not_added_to(tmp_path: Path) -> None:
    """Guards: a report of half the items from another seed, or another number of them."""
    live_tasks._keep_to(tmp_path, {"items": 1})
    live_tasks._keep_to(tmp_path, {"items": 1})
    with pytest.raises(MorphServeError, match="other items or settings"):
        live_tasks._keep_to(tmp_path, {"items": 2})


def told(items: list[dict[str, Any]], served: dict[str, Any], acc: float) -> str:
    """Return what is written of a task that was asked."""
    return json.dumps({"scores": {"acc": acc}, "served": served, "load": {"ok": 1}, "took_s": 1.0, "items": items})


def test_what_a_run_does_not_show_is_told() -> None:
    """Guards: no loss under a load that never came, or of items computed at levels that nobody knows."""
    still, items = status_change({}, status(25, 0)), [item(0, True, -1.0, l0=50)]
    found = [{"served": still, "load": {"cutoff": 3}, "items": items}]
    assert live_tasks._doubts_of("slo", found, 0, True) == [], "without a load no level need move"
    (unmoved, unanswered) = live_tasks._doubts_of("slo", found, 0, False)
    assert "never left" in unmoved and "no request of the load was answered" in unanswered
    found = [{"served": status_change({}, {}), "load": {"ok": 1}, "items": [item(0, True, -1.0)]}]
    (unknown,) = live_tasks._doubts_of("static_w8", found, 1, False)
    assert "of 1 items nobody knows" in unknown


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: columns of another run or task, a doubt that stays in the file."""
    for name, loglik, served in (
        ("stock", -2.0, status_change({}, {})),
        ("slo", -2.5, status_change({}, status(25, 75, degrade=3, restore=2))),
        ("still", -2.0, status_change({}, status(25, 0))),
    ):
        (tmp_path / name).mkdir()
        items = [item(i, name == "stock", loglik, 2, **({"l1": 50} if name == "slo" else {})) for i in range(2)]
        (tmp_path / name / "cloze_qmsum.json").write_text(told(items, served, 0.25), encoding="utf-8")
        (tmp_path / name / "rest.json").write_text('{"level": 0}', encoding="utf-8")
    document = live_tasks._report(tmp_path, ["stock", "slo", "still"], ["cloze_qmsum"], {"stock"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["slo", "cloze_qmsum", "2", "0.250", "3.49", "-0.2500", "0.0000", "2", "0", "100%",
                                "75%", "5"]  # fmt: skip
    assert document["doubts"] == lines[4:] and [line[:23] for line in lines[4:]] == [
        "still: never left level", "still: of 2 items nobod"
    ]  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == document
