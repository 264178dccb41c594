"""The search that knows the future: what it finds can be done, is at least as good as what it began with, and is found
again."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from cpu.sim_world import CALIBRATION, SERVER, config, workload

from morphserve.config import MorphServeConfig, parse_config
from morphserve.control import Controller, EngineView
from morphserve.errors import ConfigError
from morphserve.tools.bench import main
from morphserve.tools.clairvoyant import Frontier, Point, SearchOptions, World, find, search
from morphserve.tools.clairvoyant.world import Limit
from morphserve.tools.sim import Schedule, simulate
from morphserve.tools.workload import Slo, WorkloadSpec, load_workload

DEMO = Path(__file__).parents[2] / "policies" / "yaml" / "demo.yaml"
SHIPPED = load_workload(WorkloadSpec(Path(__file__).parents[2] / "scripts" / "workloads" / "hybB.jsonl"))
HARD = replace(SHIPPED, requests=tuple(request for request in SHIPPED.requests if request.arrival_s < 30.0))
SLO = Slo(ttft_s=1.0, tpot_s=0.15)
# Calm, then a crowd that full precision has no room for, then calm.
CROWD = workload([(0.5, 60, 40), *((4.0 + i / 50, 100, 60) for i in range(20)), (9.0, 60, 40), (11.0, 60, 40)])


def world(settings: MorphServeConfig | None = None, **more: object) -> World:
    return World(CROWD, SERVER, settings or config(), CALIBRATION, SLO, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_policy_wanted_makes_the_same_run_again(asynchronous: bool) -> None:
    """Guards: a schedule whose transitions cost something else than a policy's, or a tick left out that did more."""
    server = replace(SERVER, step_noise=0.1, async_scheduling=asynchronous, prefix_caching=asynchronous)
    for settings in (config(kind="threshold"), config(kind="slo"), config(kind="static", level="w8")):
        done = simulate(HARD, server, settings, CALIBRATION)
        again = simulate(HARD, server, config(), CALIBRATION, schedule=done.schedule)
        assert again.ends == done.ends and again.levels == done.levels
        assert again.tokens_by_level == done.tokens_by_level and again.transitions == done.transitions
        assert again.preemptions == done.preemptions and again.outcomes == done.outcomes
        if settings.policy.kind != "static":
            assert len(done.schedule.levels) >= 3


def test_ticks_are_left_out_until_a_transition_was_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a search ten times as slow; a wait after an aborted transition, whose end only a tick sees."""
    ticks, whole = [0], Controller.tick

    def counted(self: Controller, view: EngineView) -> None:
        ticks[0] += 1
        whole(self, view)

    monkeypatch.setattr(Controller, "tick", counted)
    crowds = workload([(start + i / 50, 100, 150) for start in (0.0, 20.0) for i in range(20)])
    own, found = config(), []
    for drain_timeout_s in (60.0, 0.01):
        settings = own.model_copy(update={"kv": own.kv.model_copy(update={"drain_timeout_s": drain_timeout_s})})
        ticks[0] = 0
        done = simulate(crowds, SERVER, settings, CALIBRATION, schedule=Schedule((0.0, 1.5, 1.6), (1, 0, 1)))
        assert done.status is not None
        found.append(("restore_aborted" in done.status["counters"]["transitions"], ticks[0] / done.num_steps))
    (calm, few), (aborted, many) = found
    assert not calm and few < 0.2 and aborted and many > 0.5


def test_the_best_of_a_tiny_load_is_found() -> None:
    """Guards: a search that stops at the first valley, or never reaches what trying everything finds."""
    here = world()
    best = Frontier()
    for levels in itertools.product(range(len(here.ladder)), repeat=3):
        schedule = Schedule.constant(0)
        for i, level in enumerate(levels):
            schedule = schedule.changed(4.0 * i, 4.0 * i + 4.0 if i < 2 else float("inf"), lambda _, to=level: to)
        best.offer(here.run(schedule, "enumerated"))
    assert len(list(best)) > 2 and best.best(0).late == 0 < best.best(0).kl < here.run(Schedule.constant(1), "").kl
    options = SearchOptions(clairvoyant_runs=300, clairvoyant_chunk_s=4.0)
    found = search(world(), [], [point.late for point in best if point.kl], 12.0, options)
    for point in best:
        assert found.best(point.late).late <= point.late and found.best(point.late).kl <= point.kl


def test_the_same_search_finds_the_same() -> None:
    """Guards: figures that nobody can make again; a seed that draws nothing."""
    options = SearchOptions(clairvoyant_runs=60, clairvoyant_chunk_s=1.0)
    policies = {"threshold": config(), "stock": None}
    found = [find(world(), policies, options, seed).document() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert json.loads(json.dumps(found[0])) == found[0]


@pytest.mark.parametrize("runs", [1, 40])
def test_nothing_it_was_given_is_better(runs: int) -> None:
    """Guards: a negative regret; a bound that a level which never changes beats; a search that loses its starts."""
    here, w8 = world(), config(kind="static", level="w8")
    policies = {"threshold": config(), "slo": config(kind="slo"), "w8": w8, "stock": None}
    findings = find(here, policies, SearchOptions(clairvoyant_runs=runs))
    constant = [here.run(Schedule.constant(level), "") for level in range(len(here.ladder))]
    for point in (*findings.policies, *constant):
        best = findings.best(point)
        assert best.late <= point.late and best.kl <= point.kl
    assert {point.source for point in findings.policies} == set(policies)
    for point in findings.frontier:  # and each can be done
        again = here.run(point.schedule, "")
        assert (again.late, again.kl) == (point.late, point.kl)


def test_the_search_keeps_to_its_runs() -> None:
    """Guards: a search without end."""
    here = world()
    starts = len(here.ladder)
    search(here, [], [0, 1, 2], 12.0, SearchOptions(clairvoyant_runs=50))
    assert here.num_runs <= starts + 50


def test_a_run_is_given_up_only_where_it_cannot_win() -> None:
    """Guards: a good schedule thrown away half-way: late counted twice, or of who may still be in time."""
    here, draw = world(), random.Random(4)
    beaten = stopped = 0
    for _ in range(60):
        schedule = Schedule.constant(draw.randrange(3))
        for start in range(12):
            if draw.random() < 0.3:
                schedule = schedule.changed(start, start + 1, lambda _: draw.randrange(len(here.ladder)))
        whole = here.run(schedule, "")
        limit = Limit(draw.choice((0, 2, 5)), draw.choice((0, 0, 3)), draw.choice((0.005, 0.02, 0.1)))
        found = here.beats(schedule, "", limit)
        assert (found is not None) == limit.beaten_by(whole.late, whole.kl)
        beaten += found is not None
        stopped += found is None
    assert beaten > 5 and stopped > 5


def test_giving_up_saves_most_of_a_run() -> None:
    """Guards: a watch that is asked, and whose answer nobody hears."""
    steps = [
        simulate(HARD, SERVER, config(), CALIBRATION, schedule=Schedule.constant(0), give_up=give_up).num_steps
        for give_up in (None, lambda engine: engine.now_s > 5.0)
    ]
    assert steps[1] < steps[0] / 4


def test_a_schedule_changes_where_it_is_told() -> None:
    """Guards: a level that spills over an edge, a change that is none, a start that is at another level."""
    schedule = Schedule((0.0, 2.0, 5.0), (1, 3, 0))
    assert [schedule.at(t) for t in (-9, 0, 1.9, 2, 4.9, 5, 99)] == [1, 1, 1, 3, 3, 0, 0]
    assert schedule.highest(0.0, 2.0) == 1 and schedule.highest(1.0, 2.5) == 3 and schedule.highest(5.0, 9.0) == 0
    capped = schedule.changed(0.0, 3.0, lambda level: min(level, 1))
    assert [capped.at(t) for t in (-9, 2.9, 3.0, 4.9, 5.0)] == [1, 1, 3, 3, 0] and len(capped.levels) == 3
    first = schedule.changed(0.0, 1.0, lambda _: 2)
    assert [first.at(t) for t in (-9, 0.9, 1.0)] == [2, 2, 1]
    assert schedule.changed(3.0, float("inf"), lambda _: 3).levels == (1, 3)
    assert schedule.changed(0.0, float("inf"), lambda _: 4) == Schedule.constant(4)


def test_the_frontier_keeps_what_nothing_beats() -> None:
    """Guards: a beaten run among the best, and a better one left out."""
    frontier = Frontier()
    scores = ((3, 0.1), (1, 0.3), (3, 0.2), (2, 0.3), (0, 0.9))
    runs = [Point(late, kl, Schedule.constant(0), "") for late, kl in scores]
    assert [frontier.offer(run) for run in runs] == [True, True, False, False, True]
    assert [(point.late, point.kl) for point in frontier] == [(0, 0.9), (1, 0.3), (3, 0.1)]
    assert frontier.offer(Point(1, 0.05, Schedule.constant(0), "")) and len(list(frontier)) == 2
    assert frontier.best(0).kl == 0.9 and frontier.best(7).kl == 0.05


@pytest.mark.parametrize(
    ("times", "levels", "message"),
    [
        ((), (), "0 times and 0 levels"),
        ((0.0,), (1, 2), "1 times and 2 levels"),
        ((1.0, 1.0), (1, 2), "must ascend"),
        ((0.0,), (-1,), "level is -1"),
    ],
)
def test_a_schedule_that_is_none_is_refused(times: tuple[float, ...], levels: tuple[int, ...], message: str) -> None:
    """Guards: a run by levels that nobody meant."""
    with pytest.raises(ConfigError, match=message):
        Schedule(times, levels)


def test_levels_that_there_are_not_and_that_nobody_measured_are_refused() -> None:
    """Guards: a search whose cost is made of nothing; a level beyond the ladder."""
    with pytest.raises(ConfigError, match="schedule wants level 9, the ladder has 0 to 4"):
        simulate(CROWD, SERVER, config(), CALIBRATION, schedule=Schedule.constant(9))
    unmeasured = parse_config({"ladder": {"steps": [{"format": "w8", "layers_per_level": 30}]}})
    with pytest.raises(ConfigError, match="levels 1 have no measured quality cost"):
        world(unmeasured)


def simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path, *args: object) -> tuple[int, str, str]:
    CALIBRATION.save(tmp_path / "times.json")
    common = ("--workload", "synthetic:2,duration=15,rate=2,burst=6", "--input-clip", "8,120", "--output-clip", "4,200")
    code = main([*map(str, (*common, "--out", tmp_path / "out", *args))])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_comparison_says_what_its_runs_cost_beyond_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: an option that does nothing; regrets of other runs than those that are reported."""
    code, out, err = simulated(
        capsys, tmp_path, "--simulate", "--step-times", tmp_path / "times.json", "--compare",
        "stock,morphserve,static_w8", "--config", DEMO, "--clairvoyant", "--clairvoyant-runs", "30",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    found = document["clairvoyant"]["policies"]
    for run, row in zip(document["runs"], found, strict=True):
        assert row["name"] == run["name"] and row["violation_rate"] == pytest.approx(run["violation_rate"])
        assert row["expected_kl_per_token"] == pytest.approx(run["expected_kl_per_token"] or 0.0)
        assert row["regret"] >= 0.0
    assert found[2]["regret"] > 0.0
    text = (tmp_path / "out" / "clairvoyant.md").read_text(encoding="utf-8")
    assert "Best schedule found knowing the future" in text and "| static_w8 |" in text and text in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--clairvoyant"], "searches in virtual time"),
        (["--simulate", "--step-times", "TIMES", "--clairvoyant"], "--clairvoyant needs --config"),
        (["--simulate", "--step-times", "TIMES", "--clairvoyant-runs", "5"], "--clairvoyant-runs is of a search"),
        (["--simulate", "--step-times", "TIMES", "--config", DEMO, "--clairvoyant", "--repeats", "2"],
         "--repeats is 2"),
        (["--simulate", "--step-times", "TIMES", "--config", DEMO, "--clairvoyant", "--clairvoyant-runs", "0"],
         "--clairvoyant-runs is 0, must be 1 or more"),
        (["--simulate", "--step-times", "TIMES", "--config", DEMO, "--clairvoyant", "--clairvoyant-chunk-s", "nan"],
         "--clairvoyant-chunk-s is nan, must be above 0 s"),
        (["--simulate", "--step-times", "TIMES", "--config", DEMO, "--clairvoyant", "--compare", "other", "--policy",
          "other=OTHER"], "other differs from --config in ladder"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a search that is silently left out, one without end, and a regret against other levels."""
    (tmp_path / "other.yaml").write_text(DEMO.read_text().replace("w8: 0.0289", "w8: 0.03"))
    own = {"TIMES": tmp_path / "times.json", "other=OTHER": f"other={tmp_path / 'other.yaml'}"}
    code, _, err = simulated(capsys, tmp_path, *(own.get(str(arg), arg) for arg in args), "--quiet")
    assert code == 1 and message in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists(), err
