"""The search: the same trials every time, however it was interrupted, and a file that refuses to be mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cpu.tuning_world import make_space, make_world
from optuna.trial import FrozenTrial, TrialState

from morphserve.config import MorphServeConfig
from morphserve.tools.sim import Simulated, simulate
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.evaluate import Evaluator, Invalid, Scored
from morphserve.tools.tune.score import Score
from morphserve.tools.tune.search import BATCH, Search, scores_of
from morphserve.tools.tune.space import Space
from morphserve.tools.tune.store import StudyFile
from morphserve.tools.workload import Workload

pytestmark = pytest.mark.cpu

SETTINGS: dict[str, Any] = {"config": {"policy": {"kind": "threshold"}}, "versions": {"morphserve": "1"}}
TRIALS = 47  # past the random ones, and not a whole number of batches


def score(config: MorphServeConfig, worst: float = 0.8) -> Scored:
    """Cheap, and with a front: late degrading costs violations, early degrading costs quality."""
    policy: Any = config.policy
    if policy.target_usage > policy.degrade_above:
        return Invalid(f"target {policy.target_usage}")
    late = round(1000 * abs(policy.degrade_above - worst) * policy.restore_after_s)
    return [Score(4000, late, 1000, 10 * policy.target_usage + 3 * (policy.max_level == "w8"), 2, 0)]


def evaluate(configs: Sequence[MorphServeConfig]) -> Iterator[Scored]:
    """One after the other."""
    return (score(config) for config in configs)


def nothing(trial: FrozenTrial) -> None:
    """No progress display."""


def kept(trials: Sequence[FrozenTrial]) -> list[str]:
    """What must be the same, digit by digit."""
    return [repr((t.number, t.state, t.params, t.values, sorted(t.user_attrs.items()))) for t in trials]


def run(
    file: Path, space: Space, num_trials: int = TRIALS, seed: int = 0, how: Callable[..., Any] = evaluate
) -> list[str]:
    """One run of the tool; the trials as the file has them."""
    store = StudyFile(file, SETTINGS)
    try:
        search = Search(space, seed, store)
        search.run(num_trials, how, nothing)
        assert kept(search.trials) == kept(store.trials())
        return kept(store.trials())
    finally:
        store.close()


def test_the_same_study_twice(tmp_path: Path) -> None:
    """Guards: a random state that is not the seed's gets in; or the seed does not."""
    space = make_space(tmp_path)
    first = run(tmp_path / "a", space)
    assert first == run(tmp_path / "b", space)
    assert first != run(tmp_path / "c", space, seed=1)
    assert len(set(line.split("{")[1] for line in first)) > TRIALS // 2


@pytest.mark.parametrize("stop_after", [3, BATCH, 38, 41])
def test_interrupted_and_resumed_is_as_uninterrupted(tmp_path: Path, stop_after: int) -> None:
    """Guards: resuming draws other numbers, or lets the model see trials of its own batch."""
    space = make_space(tmp_path)
    count = 0

    def interrupted(configs: Sequence[MorphServeConfig]) -> Iterator[Scored]:
        nonlocal count
        for config in configs:
            answer = score(config)
            if not isinstance(answer, Invalid):
                count += 1
            if count > stop_after:
                raise KeyboardInterrupt
            yield answer

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", space, how=interrupted)
    assert run(tmp_path / "a", space) == run(tmp_path / "b", space)


def test_more_trials_later_are_those_of_a_longer_study(tmp_path: Path) -> None:
    """Guards: a study of 13 trials that is made longer goes another way than one of 47 from the start."""
    space = make_space(tmp_path)
    run(tmp_path / "a", space, num_trials=13)
    run(tmp_path / "a", space, num_trials=41)
    whole = run(tmp_path / "b", space)
    assert run(tmp_path / "a", space) == whole
    assert run(tmp_path / "a", space, num_trials=5) == whole  # fewer: nothing to do, nothing lost


def test_later_trials_learn_from_earlier_ones(tmp_path: Path) -> None:
    """Guards: what is resumed so well is random search."""
    space = make_space(tmp_path)
    here = run(tmp_path / "a", space)
    there = run(tmp_path / "b", space, how=lambda configs: (score(c, worst=0.55) for c in configs))

    def drawn(lines: list[str]) -> list[str]:
        return [line.split("}")[0] for line in lines]

    assert [a.split("{")[1] for a in drawn(here)[:30]] == [b.split("{")[1] for b in drawn(there)[:30]]
    assert [a.split("{")[1] for a in drawn(here)[40:]] != [b.split("{")[1] for b in drawn(there)[40:]]


def test_combinations_that_are_refused_are_pruned(tmp_path: Path) -> None:
    """Guards: one policy that a server would refuse ends the study, or counts as a good one."""
    space = make_space(tmp_path)
    store = StudyFile(tmp_path / "a", SETTINGS)
    search = Search(space, 0, store)
    search.run(TRIALS, evaluate, nothing)
    pruned = [t for t in search.trials if t.state is TrialState.PRUNED]
    refused = [t for t in search.trials if t.params["policy.target_usage"] > t.params["policy.degrade_above"]]
    assert pruned == refused and 0 < len(pruned) < TRIALS
    assert all("target" in t.user_attrs["reason"] and t.values is None for t in pruned)
    store.close()


def test_a_line_that_was_not_written_to_its_end_is_dropped(tmp_path: Path) -> None:
    """Guards: a run that was killed while it wrote leaves a study that nobody can open."""
    space = make_space(tmp_path)
    whole = run(tmp_path / "a", space)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-40])
    assert run(tmp_path / "a", space) == whole


def test_another_study_is_not_gone_on_with(tmp_path: Path) -> None:
    """Guards: trials of two configs, versions or traces end up on one front."""
    space = make_space(tmp_path)
    run(tmp_path / "a", space, num_trials=3)
    changed = json.loads(json.dumps(SETTINGS))
    changed["config"]["policy"]["kind"] = "slo"
    changed["dev"] = {"0": "mine.jsonl (abc)"}
    with pytest.raises(TuningError) as e:
        StudyFile(tmp_path / "a", changed)
    assert "config.policy.kind: 'threshold' in the study, 'slo' now" in str(e.value)
    assert "dev: '(not there)' in the study" in str(e.value)
    assert "versions" not in str(e.value) and "another --out" in str(e.value)


@pytest.mark.parametrize("content", ["SQLite format 3\n", "{}\n", '{"op_code": 77}\n', "[1]\n"])
def test_a_file_that_is_no_study(tmp_path: Path, content: str) -> None:
    """Guards: a traceback of Optuna, or a foreign file that is written into."""
    (tmp_path / "a").write_text(content)
    with pytest.raises(TuningError, match="no study|other studies|other settings"):
        StudyFile(tmp_path / "a", SETTINGS)
    assert (tmp_path / "a").read_text() == content


def test_two_runs_on_one_study(tmp_path: Path) -> None:
    """Guards: two processes number their trials alike."""
    first = StudyFile(tmp_path / "a", SETTINGS)
    with pytest.raises(TuningError, match="another run"):
        StudyFile(tmp_path / "a", SETTINGS)
    first.close()
    StudyFile(tmp_path / "a", SETTINGS).close()


def test_a_study_that_this_seed_did_not_make(tmp_path: Path) -> None:
    """Guards: the rest of a batch is drawn by another sampler than its beginning."""
    space = make_space(tmp_path)
    run(tmp_path / "a", space, num_trials=3)
    with pytest.raises(TuningError, match="trial 0 has"):
        run(tmp_path / "a", space, seed=1)


def test_the_number_of_processes_does_not_change_the_scores(tmp_path: Path) -> None:
    """Guards: answers of several processes come in the order in which they end."""
    world, space = make_world(tmp_path), make_space(tmp_path)
    with Evaluator(world, 1) as alone, Evaluator(world, 2) as together:
        seen = []
        for evaluator, name in ((alone, "a"), (together, "b")):
            seen.append(run(tmp_path / name, space, 12, how=lambda c, e=evaluator: e.scores(c, range(2))))
    assert seen[0] == seen[1]
    store = StudyFile(tmp_path / "a", SETTINGS)
    scores = [scores_of(t) for t in store.trials() if t.state is TrialState.COMPLETE]
    assert scores and all(len(parts) == 2 for parts in scores)
    assert any(parts[0].late != parts[1].late or parts[0].nats != parts[1].nats for parts in scores)
    store.close()


def test_a_policy_that_came_before_is_not_simulated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a search that comes back pays twice, or gets the scores of another window."""
    world, config = make_world(tmp_path), make_space(tmp_path).config
    names: list[str] = []

    def counted(workload: Workload, *args: Any, **options: Any) -> Simulated:
        names.append(workload.name)
        return simulate(workload, *args, **options)

    monkeypatch.setattr("morphserve.tools.tune.evaluate.simulate", counted)
    with Evaluator(world, 1) as evaluator:
        first = list(evaluator.scores([config, config], [0, 1]))
        assert list(evaluator.scores([config], [0, 1])) == first[:1] == first[1:]
        [stock] = evaluator.scores([None], [0, 1])
    assert names == ["dev", "held_out"] * 2
    assert stock != first[0]
