"""What a study concludes: front, best policies, baselines that are as good, scores on traces that nobody tuned on."""

from __future__ import annotations

import pytest
from cpu import sim_world

from morphserve.tools.sim.morphing import plan_ladder
from morphserve.tools.tune.baselines import Baseline, baseline_configs
from morphserve.tools.tune.score import Score, Scores, total
from morphserve.tools.tune.selection import Best, Candidate, best_within, pareto_front, verdict, warnings_of
from policies import StaticConfig

pytestmark = pytest.mark.cpu


def score(late: int, cost: float) -> Score:
    """Of 1,000 requests and as many tokens."""
    return Score(1000, late, 1000, 1000 * cost, 0, 0)


def scores(dev: tuple[int, float], held_out: tuple[int, float] | None = None) -> Scores:
    """One window each."""
    return Scores((score(*dev),), () if held_out is None else (score(*held_out),))


def candidate(number: int, dev: tuple[int, float], held_out: tuple[int, float] | None = (20, 0.02)) -> Candidate:
    """A trial."""
    return Candidate(number, {}, scores(dev, held_out))


def baselines(**by_name: Scores) -> list[Baseline]:
    """Ones that are worse than everything, but for those that are given."""
    bad = scores((900, 0.9), (900, 0.9))
    names = ("stock", "static_w8", "current")
    return [Baseline(name, None, by_name.get(name, bad)) for name in names]


def test_windows_add_up_as_one_run() -> None:
    """Guards: a window of ten requests weighs as much as one of hundreds."""
    both = total([Score(10, 10, 100, 3.0, 1, 2), Score(490, 0, 900, 1.0, 3, 4)])
    assert (both.violations, both.cost) == (0.02, 0.004)
    assert (both.transitions, both.preemptions) == (4, 6)


def test_the_front_leaves_out_what_another_dominates() -> None:
    """Guards: a policy is shown that another beats in both, or twice."""
    trials = [(0, (50, 0.01)), (1, (0, 0.03)), (2, (50, 0.02)), (3, (0, 0.03)), (4, (10, 0.03)), (5, (10, 0.02))]
    assert [c.number for c in pareto_front([candidate(n, s) for n, s in trials])] == [1, 5, 0]


def test_a_pick_is_the_cheapest_within_its_limit() -> None:
    """Guards: a limit met exactly counts as broken, or a policy beyond the limit is written."""
    front = pareto_front([candidate(0, (50, 0.01)), candidate(1, (10, 0.02)), candidate(2, (5, 0.03))])
    best = best_within(front, (0.0, 0.01, 0.03, 0.05))
    assert [None if p.candidate is None else p.candidate.number for p in best] == [None, 1, 1, 0]
    assert [p.name for p in best][1:] == ["best_le_1pct", "best_le_3pct", "best_le_5pct"]
    assert best_within(front, (0.005,))[0].name == "best_le_0.5pct"


def _warnings(*tuned: Candidate, limit: float = 0.05, **by_name: Scores) -> list[str]:
    return warnings_of([Best(limit, c) for c in tuned], baselines(**by_name), list(tuned))


def test_a_baseline_that_is_no_worse_is_named() -> None:
    """Guards: a tuned policy is praised where the model in W8 for good does the same for the same price."""
    tuned = candidate(7, (10, 0.02))
    assert _warnings(tuned) == []
    [dev] = _warnings(tuned, static_w8=scores((10, 0.02), (900, 0.9)))
    assert dev.startswith("static_w8 dominates best_le_5pct on the dev windows: 1.0 % violations at 0.0200")
    assert _warnings(tuned, static_w8=scores((9, 0.021), (21, 0.02))) == []
    [held_out] = _warnings(tuned, stock=scores((11, 0.0), (20, 0.0)))
    assert "stock dominates best_le_5pct on the held-out windows" in held_out
    assert "No morphing is needed there" in held_out


def test_a_policy_that_is_not_better_than_the_current_one_is_named() -> None:
    """Guards: overfitting to the dev windows goes unnoticed."""
    tuned = candidate(7, (10, 0.02), (20, 0.02))
    [warning] = _warnings(tuned, current=scores((30, 0.03), (20, 0.02)))
    assert "best_le_5pct: not better than the current policy on the held-out windows" in warning
    both = [Best(0.05, tuned), Best(0.1, tuned)]
    [warning] = warnings_of(both, baselines(current=scores((30, 0.03), (20, 0.02))), [tuned])
    assert warning.startswith("best_le_5pct, best_le_10pct: not better")
    [warning] = _warnings(tuned, current=scores((10, 0.01), (900, 0.9)))
    assert "not better than the current policy even on the dev windows" in warning
    assert _warnings(tuned, current=scores((30, 0.03), (19, 0.03))) == []


def test_limits_that_do_not_hold_are_named() -> None:
    """Guards: `best_le_1pct` breaks 2 % of its promises on other traffic, or does not exist, and nobody says so."""
    [warning] = _warnings(candidate(7, (10, 0.02), (20, 0.02)), limit=0.01)
    assert "best_le_1pct does not keep its limit on the held-out windows: 2.0 % violations, at most 1.0 %" in warning
    front = [candidate(7, (10, 0.02))]
    [warning] = warnings_of(best_within(front, (0.0, 0.005)), baselines(), front)
    assert warning == "no trial keeps violations at 0 % or 0.5 % on the dev windows; the fewest are 1.0 %."
    [warning] = warnings_of(
        [Best(0.05, candidate(7, (10, 0.02), None))],
        [Baseline("stock", None, scores((900, 0.9))), Baseline("current", None, scores((900, 0.9)))],
        front,
    )
    assert "no held-out window" in warning


@pytest.mark.parametrize(
    ("own", "current", "words"),
    [
        ((10, 0.02), (10, 0.03), "better than current on held-out"),
        ((10, 0.02), (10, 0.02), "not better than current on held-out"),
        ((5, 0.03), (10, 0.02), "fewer violations, more cost than current on held-out"),
        ((15, 0.01), (10, 0.02), "more violations, less cost than current on held-out"),
    ],
)
def test_verdicts_are_taken_on_held_out_windows(
    own: tuple[int, float], current: tuple[int, float], words: str
) -> None:
    """Guards: `better` is said of a trade, or of the windows that were tuned on."""
    before = Baseline("current", None, scores((0, 0.0), current))
    assert verdict(candidate(0, (500, 0.5), own), before) == words
    on_dev = Baseline("current", None, scores(current))
    assert verdict(candidate(0, own, None), on_dev) == words.replace("held-out", "dev")


def test_every_format_that_all_layers_can_have_is_a_baseline() -> None:
    """Guards: static W4 is forgotten, or a static baseline is asked for that the ladder has no level of."""
    config = sim_world.config()
    found = baseline_configs(config, plan_ladder(config, sim_world.SERVER, sim_world.CALIBRATION, None))
    assert list(found) == ["stock", "static_w8", "static_w4", "current"]
    assert found["stock"] is None and found["current"] is config
    static = found["static_w4"]
    assert static is not None and static.policy == StaticConfig(kind="static", level="w4")
    assert static.ladder == config.ladder
