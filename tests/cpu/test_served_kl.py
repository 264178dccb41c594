"""Served quality: what is recorded of a server's answers, and what comes of it beside the model at full precision."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu.test_replay_compare import QUIET, STARTED, comparison
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from morphserve.tools.bench.cli import comparison_of
from morphserve.tools.bench.options import build_parser
from morphserve.tools.bench.runner import run_all
from morphserve.tools.profile import StreamedModel
from morphserve.tools.quality import Scored, cli, divergence, level_rows, score_answers
from morphserve.tools.workload import (
    CUTOFF,
    OK,
    UNKNOWN,
    Outcome,
    ReplayError,
    ServedAnswer,
    load_answers,
    save_answers,
)
from morphserve.tools.workload.workload import Workload

pytestmark = pytest.mark.cpu

VOCABULARY = 64
_ROUNDING = 1e-5  # a log probability of up to 16 in fp32 is off by up to 1e-6, and some ten operations make it


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module, torch.nn.Module]:
    """A random model's directory, the model, and one whose weights are a little off, as a server's may be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    directory = tmp_path_factory.mktemp("model")
    base.save_pretrained(directory)
    off = copy.deepcopy(base)
    for parameter in off.model.layers.parameters():
        parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
    return directory, base, off


def answered(server: torch.nn.Module, prompt: list[int], length: int, width: int) -> ServedAnswer:
    """Greedy tokens of a server, with its `width` most probable at each."""
    tokens: list[int] = []
    ids, logprobs = [], []
    for _ in range(length):
        row = server(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)
        top = row.topk(width)
        ids.append(top.indices.numpy().astype(np.int32))
        logprobs.append(top.values.numpy())
        tokens.append(int(row.argmax()))
    return ServedAnswer(
        np.array(prompt, np.int32), np.array(tokens, np.int32), np.array(ids), np.array(logprobs),
        np.array([0] * (length // 2) + [2] * (length - length // 2), np.int16),
    )  # fmt: skip


def exact(base: torch.nn.Module, off: torch.nn.Module, answer: ServedAnswer) -> np.ndarray:
    """KL(base || off) of each token over the whole vocabulary."""
    text = torch.tensor(np.concatenate([answer.prompt, answer.tokens]).astype(np.int64))[None]
    p, q = (model(text).logits[0].log_softmax(-1).double() for model in (base, off))
    found = (p.exp() * (p - q)).sum(-1)[len(answer.prompt) - 1 : -1]
    return found.numpy()


def test_what_is_all_recorded_is_the_divergence(models: Any) -> None:
    """Guards the figure: positions shifted by one, a direction turned round, or answers that are mixed up."""
    directory, base, off = models
    answers = [answered(off, [1, 2, 3], 12, VOCABULARY), answered(off, [9, 8, 7, 6, 5, 4], 7, VOCABULARY)]
    scored = score_answers(StreamedModel(directory), answers)
    for answer, found in zip(answers, scored, strict=True):
        assert found.kl == pytest.approx(exact(base, off, answer), rel=1e-3, abs=_ROUNDING)
        assert found.kl.mean() > 1e-4 and found.seen == pytest.approx(np.ones(len(answer.tokens)), abs=1e-5)
        assert (found.levels == answer.levels).all()
    text = torch.tensor([[1, 2, 3, *answers[0].tokens.tolist()]])
    rows = base(text).logits[0, 2:-1].log_softmax(-1)
    assert scored[0].logprob == pytest.approx(rows[range(12), answers[0].tokens].numpy(), abs=1e-4)


def test_what_is_recorded_in_part_is_a_bound(models: Any) -> None:
    """Guards: a probability that nobody recorded taken for 0, which makes any figure."""
    directory, base, off = models
    whole = exact(base, off, answered(off, [1, 2, 3], 12, VOCABULARY))
    model = StreamedModel(directory)
    means = []
    for width in (1, 4, 16, VOCABULARY):
        (found,) = score_answers(model, [answered(off, [1, 2, 3], 12, width)])
        assert (found.kl >= -_ROUNDING).all() and (found.kl <= whole + _ROUNDING).all()
        means.append(found.kl.mean())
    assert means == sorted(means) and means[-1] == pytest.approx(whole.mean(), rel=1e-3)


def test_the_model_itself_is_at_no_distance(models: Any) -> None:
    """Guards the floor under which nothing can be told."""
    directory, base, _ = models
    (found,) = score_answers(StreamedModel(directory), [answered(base, [5, 6], 10, 20)])
    assert abs(found.kl).max() < _ROUNDING and 0.3 < found.seen.mean() <= 1


def test_many_answers_are_read_in_batches(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: hidden states of a whole replay at once, and answers of another batch or of other rows."""
    directory, _, off = models
    answers = [answered(off, [1 + i, 2], 5 + i, 8) for i in range(4)]
    whole = score_answers(StreamedModel(directory), answers)
    monkeypatch.setattr("morphserve.tools.quality.scoring._TOKENS", 10)
    monkeypatch.setattr("morphserve.tools.quality.scoring._ROWS", 3)
    seen: list[tuple[int, int]] = []
    parts = score_answers(StreamedModel(directory), answers, lambda *done: seen.append(done))
    for one, other in zip(whole, parts, strict=True):
        assert one.kl == pytest.approx(other.kl, abs=_ROUNDING)
        assert one.logprob == pytest.approx(other.logprob, abs=_ROUNDING)
    assert seen[0] == (1, 6) and seen[-1] == (6, 6)  # two batches of three layers


@given(st.data())
def test_the_bound_holds_for_any_two_distributions(data: st.DataObject) -> None:
    """Guards the arithmetic where much, or nothing, is left over: never below 0, never above the divergence."""
    weights = st.lists(st.floats(0.0, 12.0), min_size=8, max_size=8)
    p, q = (torch.tensor([data.draw(weights)]).double().log_softmax(-1) for _ in range(2))
    width = data.draw(st.integers(1, 8))
    top = q.topk(width)
    kl, seen = divergence(p, top.indices, top.values)
    whole = float((p.exp() * (p - q)).sum())
    assert -1e-6 <= float(kl) <= whole + 1e-6 and 0 < float(seen) <= 1 + 1e-9
    padded = [torch.nn.functional.pad(part, (0, 3), value=float(UNKNOWN)) for part in (top.indices, top.values)]
    assert float(divergence(p, *padded)[0]) == pytest.approx(float(kl), abs=1e-9)


def scored_of(kl: list[float], levels: list[int]) -> Scored:
    ones = np.ones(len(kl))
    return Scored(np.array(kl), ones, -ones, np.array(levels, np.int16))


def test_rows_are_by_level_with_their_error() -> None:
    """Guards: answers weighed alike whatever their length, and an error as if tokens were independent."""
    scored = [scored_of([0.0, 0.2, 0.4], [0, 1, 1]), scored_of([0.1], [1]), scored_of([0.0, 0.0], [0, 0])]
    whole, base, first = level_rows(scored, {0: None, 1: 0.2})
    assert (whole.level, whole.tokens, base.tokens, first.tokens) == ("all", 6, 3, 3)
    assert whole.served_kl == pytest.approx(0.7 / 6) and first.served_kl == pytest.approx(0.7 / 3)
    assert (whole.expected_kl, base.expected_kl, first.expected_kl) == (pytest.approx(0.1), 0.0, pytest.approx(0.2))
    off = np.array([0.6, 0.1, 0.0]) - 0.7 / 6 * np.array([3, 1, 2])
    assert whole.served_kl_error == pytest.approx(np.sqrt(1.5 * (off**2).sum()) / 6)
    assert level_rows(scored, {0: None, 1: None})[0].expected_kl is None
    assert level_rows([scored_of([0.1], [UNKNOWN])], None)[0].expected_kl == 0.0
    assert level_rows([scored_of([0.1], [UNKNOWN])], {0: None})[0].expected_kl is None
    assert level_rows(scored[:1], None)[0].served_kl_error is None


def outcome(index: int, tokens: list[int], **more: Any) -> Outcome:
    return Outcome(index, 0.0, 2, len(tokens), token_ids=tokens, **{"status": OK, **more})


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Guards: answers that get each other's prompts or levels, and half an answer taken for a whole one."""
    tops = [{7: -0.5, 3: -1.5}, {9: -0.25}]
    outcomes = [
        outcome(0, [7, 9], top_logprobs=tops, token_levels=[[0, 1], [2, 1]]),
        outcome(1, [7, 9], top_logprobs=tops, status=CUTOFF),
        outcome(1, [7, 9], top_logprobs=tops[:1]),  # a server that tells of some tokens alone
        outcome(2, [5], top_logprobs=[{5: -0.1}], token_levels=[[1, 3]]),  # of a receipt that was cut short
        outcome(3, []),
    ]
    save_answers(tmp_path, [[1, 2], [3], [4, 5, 6], [8]], outcomes)
    first, second = load_answers(tmp_path)
    assert first.prompt.tolist() == [1, 2] and first.tokens.tolist() == [7, 9] and first.levels.tolist() == [0, 2]
    assert first.top_ids.tolist() == [[7, 3], [9, UNKNOWN]]
    assert first.top_logprobs[0] == pytest.approx([-0.5, -1.5]) and first.top_logprobs[1, 0] == -0.25
    assert second.prompt.tolist() == [4, 5, 6] and second.levels.tolist() == [UNKNOWN]
    assert [file.name for file in tmp_path.iterdir()] == ["top_logprobs.npz"]


def test_nothing_recorded_writes_nothing(tmp_path: Path) -> None:
    """Guards: an empty file that looks like a run without quality."""
    save_answers(tmp_path, [[1]], [outcome(0, [7])])
    assert not [*tmp_path.iterdir()]
    save_answers(tmp_path, [[1]], [outcome(0, [7], top_logprobs=[{7: -0.5}])])
    save_answers(tmp_path, [[1]], [outcome(0, [7])])  # another run into the same directory
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ReplayError, match="top-logprobs 100"):
        load_answers(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_record_is_refused(tmp_path: Path, damage: bytes) -> None:
    """Guards: a traceback at a file that a full disk has cut."""
    (tmp_path / "top_logprobs.npz").write_bytes(damage)
    with pytest.raises(ReplayError, match=r"top_logprobs\.npz is damaged, or not of a replay"):
        load_answers(tmp_path)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    """Guards: a traceback of the decompressor's, or answers that nobody has given."""
    tokens = list(range(300))
    save_answers(tmp_path, [tokens], [outcome(0, tokens, top_logprobs=[{token: -0.1 * token} for token in tokens])])
    file = tmp_path / "top_logprobs.npz"
    whole = file.read_bytes()
    refused = 0
    for place in range(60, len(whole), 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            load_answers(tmp_path)
        except ReplayError:
            refused += 1
    assert refused > 10


def write_run(directory: Path, answer: ServedAnswer, model: Path, status: dict[str, Any] | None) -> None:
    directory.mkdir(parents=True)
    tops = [
        dict(zip(ids.tolist(), row.tolist(), strict=True))
        for ids, row in zip(answer.top_ids, answer.top_logprobs, strict=True)
    ]
    runs = [[0, int((answer.levels == 0).sum())], [2, int((answer.levels == 2).sum())]] if status else []
    done = outcome(0, answer.tokens.tolist(), top_logprobs=tops, token_levels=runs)
    save_answers(directory, [answer.prompt.tolist()], [done])
    result = {"setup": {"model": str(model)}, "morphserve_status": status}
    (directory / "result.json").write_text(json.dumps(result))


def test_the_command_tells_of_each_run(models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the way from a replay's directory to its figures: the ladder's, the levels', stock's."""
    directory, base, off = models
    status = {"ladder": [{"level": level, "expected_kl": kl} for level, kl in ((0, None), (1, 0.1), (2, 0.3))]}
    write_run(tmp_path / "r" / "stock", answered(base, [1, 2], 6, 30), directory, None)
    write_run(tmp_path / "r" / "morphserve", answered(off, [1, 2], 6, 30), directory, status)
    assert cli.main([str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out.splitlines()
    document = json.loads(out[-1])
    assert document["model"] == str(directory) and list(document["runs"]) == ["morphserve", "stock"]
    (stock,) = document["runs"]["stock"]
    whole, zero, two = document["runs"]["morphserve"]
    assert stock["expected_kl"] == 0.0 and abs(stock["served_kl"]) < _ROUNDING and stock["tokens"] == 6
    assert [row["expected_kl"] for row in (whole, zero, two)] == pytest.approx([0.15, 0.0, 0.3])
    assert whole["served_kl"] == pytest.approx((zero["served_kl"] + two["served_kl"]) / 2) and whole["served_kl"] > 1e-4
    assert out[0].split() == ["run", "level", "tokens", "expected", "served", "+-", "seen", "ln", "p"]
    assert [line.split()[:3] for line in out[1:-1]] == [
        ["morphserve", "all", "6"], ["morphserve", "0", "3"], ["morphserve", "2", "3"], ["stock", "all", "6"],
    ]  # fmt: skip
    assert cli.main([str(tmp_path / "r" / "stock"), "--model", str(directory), "--answers", "1"]) == 0


def test_the_command_refuses_in_one_line(models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a traceback where nothing was recorded, and two models compared with one of them."""
    directory, base, _ = models
    assert cli.main([str(tmp_path)]) == 1
    assert "no run with recorded answers" in capsys.readouterr().err
    for name, model in (("a", directory), ("b", tmp_path / "other")):
        write_run(tmp_path / name, answered(base, [1, 2], 3, 5), model, None)
    assert cli.main([str(tmp_path)]) == 1
    assert "Give the one to compare with as --model" in capsys.readouterr().err
    (tmp_path / "a" / "result.json").write_text("[]")
    assert cli.main([str(tmp_path / "a")]) == 1
    assert "result.json cannot be read" in capsys.readouterr().err


def test_a_replay_keeps_what_was_recorded(tmp_path: Path) -> None:
    """Guards the chain from servers to files: answers with the prompts that they were asked with."""
    asked = comparison(tmp_path, "stock", "morphserve")
    client = replace(asked.measurement.client, top_logprobs=2)
    asked = replace(asked, measurement=replace(asked.measurement, client=client))
    run_all(asked, STARTED, QUIET)
    for name, levels in (("stock", [UNKNOWN] * 4), ("morphserve", [0, 1, 1, 1])):
        answers = load_answers(tmp_path / "out" / name)
        assert [answer.prompt.tolist() for answer in answers] == asked.measurement.prompts
        assert all(answer.levels.tolist() == levels and answer.top_ids.shape == (4, 2) for answer in answers)


def test_a_temperature_reaches_the_client_and_the_report() -> None:
    """Guards: `--temperature` read and forgotten, or drawn answers reported as greedy ones."""
    args = build_parser("", "replay").parse_args(["--workload", "w", "--temperature", "0.7"])
    made = comparison_of(args, "w", Workload("w", (), 512), with_text=False)
    assert (made.measurement.client.temperature, made.setup["temperature"]) == (0.7, 0.7)


@pytest.mark.parametrize(("number", "arguments"), [("20", ()), ("100", ("--x", "--max-logprobs=100"))])
def test_servers_are_started_to_tell_as_many(number: str, arguments: tuple[str, ...]) -> None:
    """Guards: a stock server that refuses every request, as it tells 20 and no more by itself."""
    words = ["--workload", "w", "--top-logprobs", number, *[f"--serve-arg={word}" for word in arguments[:-1]]]
    args = build_parser("", "replay").parse_args(words)
    made = comparison_of(args, "w", Workload("w", (), 512), with_text=False)
    assert made.server.extra_args == arguments and made.measurement.client.top_logprobs == int(number)
