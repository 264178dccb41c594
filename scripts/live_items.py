"""What live_tasks.py has lm-eval ask, out of local files, and what came of it, item by item."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphserve.errors import MorphServeError
from morphserve.tools.bench.comparison import STOCK, static_format

Encode = Callable[[str, bool], list[int]]
Item = dict[str, Any]  # id, context and target; once answered, too: right, num_tokens and loglik or answer, levels
Levels = dict[tuple[int, ...], dict[str, int]]  # prompt |-> level |-> tokens of it computed there

ANSWER = "gsm8k_answer"  # the task whose answers are generated
_LEAST_CONTEXT, _MOST_CONTEXT, _ANSWER_TOKENS = 48, 96, 160
_SAME = 60  # letters that two passages have in common by no chance


def make_tasks(
    data: Path, encode: Encode, limit: int, answers: int, max_model_len: int, known: str = ""
) -> dict[str, list[Item]]:
    """Return the items of each task, spread evenly over its file; those that do not fit `max_model_len` are left out.

    Args:
        data: directory of the files.
        encode: the model's tokenizer.
        limit: items of a task.
        answers: items of `ANSWER`.
        max_model_len: of the servers.
        known: text that profiles were made on; passages of it are not asked.

    Raises:
        MorphServeError: a file is not there, or is another.
    """
    try:
        lines = (data / "wikitext2/test.txt").read_text(encoding="utf-8").splitlines()
        meetings = [json.loads(line) for line in (data / "qmsum/test.jsonl").open(encoding="utf-8")]
        problems = [json.loads(line) for line in (data / "gsm8k/test.jsonl").open(encoding="utf-8")]
        turns = [re.sub(r"\{\w+\}", " ", turn["content"]) for each in meetings for turn in each["meeting_transcripts"]]
        solved = [_solved(problem) for problem in problems]
    except (OSError, ValueError, KeyError, TypeError) as e:
        words = "Give a directory with wikitext2/test.txt, qmsum/test.jsonl and gsm8k/test.jsonl as published."
        raise MorphServeError(f"--data {data}: {type(e).__name__}: {e}. {words}") from e
    short = [each for each in solved if len(encode(each["context"] + each["target"], False)) < max_model_len]
    by_length = sorted(range(len(short)), key=lambda i: len(short[i]["context"] + short[i]["target"]))
    shown = set(by_length[:2])  # the shortest: two of them and a question leave room for an answer
    before = "".join(f"{short[i]['context']}{short[i]['target']}\n\n" for i in sorted(shown))
    asked = [each for i, each in enumerate(short) if i not in shown]
    questions = [{"context": before + e["context"], "target": e["target"].split()[-1].rstrip(".")} for e in asked]
    longest = max_model_len - _ANSWER_TOKENS - 1  # lm-eval keeps one token back
    found = {
        "cloze_wikitext": _unknown(_cloze((_untokenized(line) for line in lines), encode), known),
        "cloze_qmsum": _unknown(_cloze(turns, encode), known),
        "gsm8k_solution": asked,
        ANSWER: [each for each in questions if len(encode(each["context"], False)) < longest],
    }
    tasks = {task: _spread(items, answers if task == ANSWER else limit) for task, items in found.items()}
    if few := [task for task, items in tasks.items() if len(items) < 2]:
        raise MorphServeError(f"--data {data}: no items for {', '.join(few)} that fit --max-model-len {max_model_len}.")
    return {task: [{"id": i, **item} for i, item in enumerate(items)] for task, items in tasks.items()}


def _solved(problem: Mapping[str, str]) -> Item:
    solution, _, number = re.sub(r"<<.*?>>", "", problem["answer"]).partition("\n#### ")
    target = f" {solution.strip()}\nThe answer is {number.strip().replace(',', '')}."
    return {"context": f"Question: {problem['question'].strip()}\nAnswer:", "target": target}


def _untokenized(line: str) -> str:
    """Return the longest part of a line of WikiText without an unknown word, with spaces about as people set them."""
    part = re.sub(r" @(.)@ ", r"\1", max(line.split("<unk>"), key=len))
    return re.sub(r" ([,.;:!?)%']|n't)", r"\1", part.replace("( ", "("))


def _cloze(paragraphs: Iterable[str], encode: Encode) -> Iterator[Item]:
    """Yield the beginning of each long paragraph, as long as may be, whose next word is one of four letters or more."""
    for words in map(str.split, paragraphs):
        for end in range(min(len(words) - 1, _MOST_CONTEXT), 0, -1):
            if words[end].isalpha() and len(words[end]) > 3:
                num = len(encode(context := " ".join(words[:end]), False))
                if num < _LEAST_CONTEXT:
                    break
                if num <= _MOST_CONTEXT:
                    yield {"context": context, "target": f" {words[end]}"}
                    break


def _unknown(items: Iterable[Item], known: str) -> Iterator[Item]:
    """Leave out the items whose passage begins in a text as it does there, whatever spaces and marks are between."""
    letters = _letters(known)
    return (item for item in items if _letters(item["context"])[:_SAME] not in letters)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()


def _spread(items: Iterable[Item], most: int) -> list[Item]:
    found = list(items)
    return [found[i * len(found) // most] for i in range(most)] if len(found) > most else found


def task_file(task: str, items: Path) -> dict[str, Any]:
    """Return lm-eval's description of a task, whose items lie in a file of JSON lines."""
    own: dict[str, Any] = {
        "output_type": "loglikelihood",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    }
    if task == ANSWER:
        last = {"function": "regex", "regex_pattern": r"-?\d+(?:,\d{3})*(?:\.\d+)?", "group_select": -1}
        exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [","]}
        stops = {"until": ["\n\n", "Question:"], "max_gen_toks": _ANSWER_TOKENS, "do_sample": False, "temperature": 0}
        own = {
            "output_type": "generate_until",
            "generation_kwargs": stops,
            "filter_list": [{"name": "last_number", "filter": [last, {"function": "take_first"}]}],
            "metric_list": [exact],
        }
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(items)}}, "test_split": "test"}
    text = {"doc_to_text": "context", "doc_to_target": "target", "target_delimiter": ""}
    return {"task": task, **where, **text, **own, "metadata": {"version": 1}}


def read_answers(
    directory: Path, task: str, encode: Encode, levels: Levels
) -> tuple[dict[str, float], list[Item]]:
    """Read what lm-eval wrote: its scores, and each item with its answer.

    Args:
        levels: by prompt, the tokens that were computed at each level.
    """
    (results,), (samples,) = directory.rglob("results_*.json"), directory.rglob(f"samples_{task}_*.jsonl")
    told = json.loads(results.read_text(encoding="utf-8"))["results"][task]
    named = {key.partition(",")[0]: told[key] for key in told}
    scores = {key: float(named[key]) for key in ("acc", "exact_match", "perplexity") if key in named}
    answered = []
    for row in map(json.loads, samples.open(encoding="utf-8")):
        item, (answer,) = row["doc"], row["filtered_resps"]
        prompt = encode(item["context"], False)
        if task == ANSWER:
            item |= {"right": bool(row["exact_match"]), "answer": answer}
        else:
            whole = encode(item["context"] + item["target"], False)
            item |= {"right": bool(row["acc"]), "loglik": float(answer[0]), "num_tokens": len(whole) - len(prompt)}
            prompt = whole
        answered.append({**item, "levels": dict(levels.get(tuple(prompt), {}))})
    return scores, sorted(answered, key=lambda item: int(item["id"]))


def status_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return what two statuses of a server say of the time between: generated tokens by level, ended transitions."""
    return {
        key: {k: n - before.get(key, {}).get(k, 0) for k, n in after.get(key, {}).items()}
        for key in ("tokens_by_level", "transitions")
    }


def share_below(tokens: Mapping[str, int]) -> float | None:
    """Return the share of tokens of a level below full precision; None without any."""
    return 1 - tokens.get("0", 0) / total if (total := sum(tokens.values())) else None


def compare(first: Sequence[Item], run: Sequence[Item]) -> dict[str, Any]:
    """Hold the items of a run against those of the first one.

    Raises:
        MorphServeError: they are of other items.
    """
    if [each["id"] for each in first] != [each["id"] for each in run]:
        raise MorphServeError("two runs have answered other items. Remove the --out directory and run again.")
    pairs = list(zip(first, run, strict=True))
    below = Counter[str]()
    for item in run:
        below.update(item["levels"])
    logs = {new["id"]: (new["loglik"] - old["loglik"]) / new["num_tokens"] for old, new in pairs if "loglik" in new}
    at_full = [logs[new["id"]] for new in run if new["id"] in logs and share_below(new["levels"]) == 0]
    nats = list(logs.values())
    return {
        "difference": statistics.fmean(nats) if nats else None,
        "standard_error": statistics.stdev(nats) / math.sqrt(len(nats)) if nats else None,
        "at_full_precision": {"items": len(at_full), "most": max(map(abs, at_full), default=None)},
        "lost": sum(old["right"] and not new["right"] for old, new in pairs),
        "won": sum(new["right"] and not old["right"] for old, new in pairs),
        "other_answer": sum(old["answer"] != new["answer"] for old, new in pairs if "answer" in new),
        "below": share_below(below),
        "levels": dict(sorted(below.items(), key=lambda pair: int(pair[0]))),
    }


def doubts(name: str, served: Sequence[Mapping[str, Mapping[str, int]]], level_at_rest: int | None) -> list[str]:
    """Return what the tasks of a run do not show, because its server did not switch, or did though it should not.

    Args:
        served: of each task, see `status_change`.
        level_at_rest: a while after the load; None = stopped before.
    """
    if name == STOCK:
        return []
    tokens, moves = Counter[str](), Counter[str]()
    for each in served:
        tokens.update(each["tokens_by_level"])
        moves.update(each["transitions"])
    if static_format(name):
        return [f"{name}: generated {n} tokens at level 0."] if (n := tokens["0"]) else []
    if not share_below(tokens):
        return [f"{name}: never left level 0. Send more load: a lower --thin, a shorter --rest."]
    if level_at_rest is None:
        return [f"{name}: stopped before it could come back to level 0. Remove one task's result and run again."]
    if not moves["restore_committed"] and level_at_rest:
        return [f"{name}: never restored a layer. Send less load: a higher --thin, a longer --rest."]
    return [f"{name}: at level {level_at_rest} a minute after the load, not 0."] if level_at_rest else []
