"""An edited YAML while the server runs: what is taken, what is refused, and what the new policy starts from."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morphserve.config import load_config, parse_config, step_times_file
from morphserve.control import DecisionLog, Phase, make_header
from morphserve.control.decisions.replay_log import replay
from morphserve.control.reload import PolicyReloader, ReloadWatch
from morphserve.control.reload.file import LOOK_INTERVAL_S, WatchedFiles
from morphserve.errors import ConfigError
from morphserve.files import write_whole
from policies import (
    BASE_FORMAT,
    EngineLimits,
    LayerMove,
    PolicySetup,
    SloConfig,
    StepTime,
    StepTimes,
    ThresholdConfig,
    load_step_times,
)
from tests.fakes import Rig, ScriptedPolicy

pytestmark = pytest.mark.cpu

LIMITS = EngineLimits(32, 16, 2048)
START = "kv: {max_preemptions: 2}\npolicy: {kind: threshold, restore_after_s: 3.0}\n"
EDITED = START.replace("3.0", "1.5")


def setup_of(config: Any) -> PolicySetup:
    file = step_times_file(config) if config.policy.kind == "slo" else None
    return PolicySetup(config.policy, None if file is None else load_step_times(file), LIMITS)


class Desk:
    """A YAML in a directory, a reloader, and what it has handed over."""

    def __init__(self, directory: Path, text: str = START) -> None:
        self.file = directory / "morph.yaml"
        self.taken: list[tuple[PolicySetup, str]] = []
        self._ticks = 0
        self.pauses: list[float] = []
        self.writes: list[str] = []  # what an editor writes in the pauses of a reload that is asked for, one each
        self.write(text)
        self.rig = Rig()
        running = load_config(self.file)
        self.reloader = PolicyReloader(
            self.file, running, setup_of(running), setup_of=setup_of, build=self._build, wall_clock=lambda: 7.0,
            pause=self._pause,
        )  # fmt: skip

    def _build(self, setup: PolicySetup) -> Callable[[str], None]:
        try:
            setup.build(self.rig.ladder)
        except ValueError as e:
            raise ConfigError(f"policy: {e}") from e
        return lambda note: self.taken.append((setup, note))

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if self.writes:
            self.write(self.writes.pop(0))

    def write(self, text: str) -> None:
        """As an editor does, with a time of its own whatever the file system's clock can tell apart."""
        self.file.write_text(text)
        self._ticks += 1
        os.utime(self.file, ns=(self._ticks, self._ticks))

    def look(self, times: int = 3) -> None:
        for _ in range(times):
            self.reloader.look()


def test_edited_policy_is_taken_once(tmp_path: Path) -> None:
    """Guards: an edit that nobody notices, or a new policy at every look."""
    desk = Desk(tmp_path)
    desk.look()
    assert desk.taken == [] and desk.reloader.reloads.last_outcome is None
    desk.write(EDITED)
    desk.look(10)
    ((setup, note),) = desk.taken
    assert isinstance(setup.section, ThresholdConfig) and setup.section.restore_after_s == 1.5
    assert note == f"{desk.file} has changed: policy.restore_after_s 3.0 -> 1.5"
    reloads = desk.reloader.reloads
    assert (reloads.reloads, reloads.refused, reloads.last_outcome, reloads.last_s) == (1, 0, "ok", 7.0)


def test_edit_before_the_first_look_counts(tmp_path: Path) -> None:
    """Guards: a file that was edited while the model was loading is taken for what the server has read."""
    desk = Desk(tmp_path)
    desk.write(EDITED)
    desk.look()
    assert len(desk.taken) == 1


def test_another_kind(tmp_path: Path) -> None:
    """Guards: only figures of the same kind can change."""
    desk = Desk(tmp_path)
    desk.write("kv: {max_preemptions: 2}\npolicy: {kind: static, level: w8}\n")
    desk.look()
    assert desk.taken[0][1].endswith("policy.kind threshold -> static")
    assert desk.reloader.reloads.kind == "static"
    assert desk.reloader.answer()["kind"] == "static"


def test_other_file_of_the_same_content_changes_nothing(tmp_path: Path) -> None:
    """Guards: a touched file, a new comment or a default written out makes the policy forget what it has seen."""
    desk = Desk(tmp_path)
    desk.look()
    desk.write("# tuned\n" + START.replace("threshold,", "threshold, mode: default,"))
    desk.look()
    assert desk.taken == [] and desk.reloader.reloads.last_outcome == "unchanged"
    assert desk.reloader.reload("SIGHUP") == {
        "ok": True, "outcome": "unchanged", "error": None, "kind": "threshold", "changed": None,
        "serves": desk.reloader.reloads.serves,
    }  # fmt: skip
    assert desk.taken == [] and desk.reloader.reloads.reloads == 0


def test_a_file_that_takes_the_place_of_one_of_its_size_and_time_is_seen(tmp_path: Path) -> None:
    """Guards: a policy put in place with its time kept, as `cp -p`, `rsync -t` and archives do, and never served."""
    desk = Desk(tmp_path)
    desk.look()
    found, beside = desk.file.stat(), tmp_path / "beside"
    beside.write_text(EDITED)
    os.utime(beside, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert beside.stat().st_size == found.st_size
    beside.replace(desk.file)
    desk.look()
    assert len(desk.taken) == 1


def test_half_written_file_is_left_alone(tmp_path: Path) -> None:
    """Guards: what an editor has written so far is served, or refused with an ERROR a second later proven wrong."""
    desk = Desk(tmp_path)
    desk.look()
    for text in (EDITED[:20], EDITED[:50], EDITED):
        desk.write(text)
        desk.look(1)
        assert desk.taken == [] and desk.reloader.reloads.refused == 0
    desk.look(1)
    assert len(desk.taken) == 1


@pytest.mark.parametrize("gap", ["empty", "gone"])
def test_file_that_is_replaced_slowly(gap: str, tmp_path: Path) -> None:
    """Guards: a truncated file means all defaults; a file that was moved away is an error; its successor is missed."""
    desk = Desk(tmp_path)
    desk.look()
    desk.write("") if gap == "empty" else desk.file.unlink()
    desk.look(5)
    assert desk.taken == [] and desk.reloader.reloads.refused == 0
    desk.write(EDITED)
    desk.look()
    assert len(desk.taken) == 1


def test_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Guards: half of the old file and half of the new one."""
    desk = Desk(tmp_path)
    desk.look()
    desk.write(EDITED.replace("1.5", "1.0"))
    desk.look(1)
    original = desk.reloader._setup_of

    def written_meanwhile(config: Any) -> PolicySetup:
        desk.reloader._setup_of = original
        desk.write(EDITED)
        return original(config)

    desk.reloader._setup_of = written_meanwhile
    desk.look(1)
    assert desk.taken == []
    desk.look()
    assert [note[-10:] for _, note in desk.taken] == ["3.0 -> 1.5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kv: {max_preemptions: 3, drain_timeout_s: 1}\nladder: {order: back_to_front}\n" + EDITED.splitlines()[1],
         "ladder.order, kv.max_preemptions, kv.drain_timeout_s. Only `policy` can change .*: restart"),
        (EDITED + "cache_dir: /elsewhere\ndecision_log_detail: all\n", "cache_dir, decision_log_detail. Only"),
        (EDITED + "step_times: other.json\n", "step_times. Only"),
        ("kv: {max_preemptions: 2}\npolicy: {kind: static, level: 77}\n", "policy: level 77 is not on the ladder"),
        ("kv: {max_preemptions: 2}\npolicy: {kind: slo, quality_budget: 9}\n", "nobody has measured those of level"),
        ("kv: {max_preemptions: 2}\npolicy: {kind: threshold, degrade_above: 7}\n", "degrade_above.*less than or"),
        ("kv: {max_preemptions: 2}\npolicy: {kind: threshold, restore_below: 0.9}\n", "restore_below 0.9 is above"),
        ("policy: [", "not valid YAML"),
        ("- 1\n", "top level is list"),
        ("\udcff", "not UTF-8 text"),
    ],
)  # fmt: skip
def test_bad_file_keeps_the_policy(text: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a refused file half taken, an engine that dies of it, an ERROR a second, or one without reason."""
    desk = Desk(tmp_path)
    desk.look()
    desk.file.write_text(text, errors="surrogateescape")
    desk.look(6)
    reloads = desk.reloader.reloads
    assert desk.taken == [] and (reloads.refused, reloads.last_outcome) == (1, "refused")
    assert reloads.last_error is not None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert re.search(words, record.getMessage(), re.DOTALL), record.getMessage()
    answer = desk.reloader.reload("SIGHUP")
    assert not answer["ok"] and answer["error"] == reloads.last_error and answer["kind"] == "threshold"
    desk.write(START)
    desk.look()
    reloads = desk.reloader.reloads
    assert (reloads.refused, reloads.last_error, reloads.last_outcome) == (2, None, "unchanged") and desk.taken == []


def test_asked_for_an_empty_file(tmp_path: Path) -> None:
    """Guards: SIGHUP in the moment in which an editor has truncated the file makes the server one of defaults."""
    desk = Desk(tmp_path, "policy: {kind: static}\n")
    desk.write("")
    answer = desk.reloader.reload("SIGHUP")
    assert not answer["ok"] and "is empty" in answer["error"] and desk.taken == []
    desk.file.unlink()
    assert "not there" in desk.reloader.reload("SIGHUP")["error"]


def test_asked_for_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Guards: half of the old file and half of the new one, taken because somebody has asked just then."""
    desk, writes = Desk(tmp_path), [EDITED]

    def read() -> str:
        found = desk.file.read_text()
        if writes:
            desk.write(writes.pop())
        return found

    assert WatchedFiles(lambda: [desk.file], desk._pause).settled(read) == EDITED



def test_asked_for_a_file_that_is_being_written(tmp_path: Path) -> None:
    """Guards: a POST in the middle of an editor's writing serves half a file; one that waits for ever for an end."""
    desk = Desk(tmp_path)
    desk.writes = [EDITED[:50], EDITED]
    desk.write(EDITED.replace("1.5", "9.0"))  # a whole file so far, of another policy
    answer = desk.reloader.reload("POST")
    assert answer["ok"] and [note[-10:] for _, note in desk.taken] == ["3.0 -> 1.5"]
    assert desk.pauses == [LOOK_INTERVAL_S] * 3
    desk.writes = [EDITED.replace("1.5", f"{i}.0") for i in range(1, 100)]
    answer = desk.reloader.reload("POST")
    assert not answer["ok"] and "is being written" in answer["error"] and len(desk.taken) == 1


SECRET = "swordfish"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"policy: {{kind: {SECRET}}}\n", "wrong or unknown at policy"),
        (f"policy: {{kind: threshold, degrade_above: {SECRET}}}\n", "wrong or unknown at policy.degrade_above"),
        (f"policy: {{kind: threshold, {SECRET}: 1}}\n", "wrong or unknown at policy"),
        (f"variants: {{w8: [{SECRET}]}}\n", "wrong or unknown at variants"),
        (f"{SECRET}: 1\n", "wrong or unknown at the top"),
        (f"- {SECRET}\n", "this policy cannot be served"),
        (f"a: 1\n  {SECRET}: [", "no YAML from line 2 on"),
        (f"kv: {{max_preemptions: 2}}\npolicy: {{kind: static, level: {SECRET}}}\n", "this policy cannot be served"),
        (f"cache_dir: /{SECRET}\n{START}", "other than the server started with: cache_dir."),
    ],
)
def test_nothing_of_the_file_is_told(text: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: who may ask for a reload reads the settings' file, or whatever that is a link to, by its errors."""
    desk = Desk(tmp_path)
    desk.write(text)
    answer = desk.reloader.reload("POST")
    assert answer["error"].startswith(told), answer
    assert SECRET not in repr(answer) + repr(desk.reloader.reloads)
    seen = (SECRET, "cache_dir", "top level is list", "not valid YAML, line 2")
    assert any(words in caplog.text for words in seen), "the operator must see what is wrong"


def test_nothing_of_the_file_is_told_of_a_change(tmp_path: Path) -> None:
    """Guards: a value that was taken, in an answer or on the status page."""
    desk = Desk(tmp_path)
    desk.write(EDITED)
    answer = desk.reloader.reload("POST")
    assert answer["changed"] == "policy.restore_after_s" == desk.reloader.reloads.note
    assert "1.5" not in repr(answer) + repr(desk.reloader.reloads)
    assert desk.taken[0][1] == "POST: policy.restore_after_s 3.0 -> 1.5", "the log and the decision log have it"


def test_one_reload_at_a_time(tmp_path: Path) -> None:
    """Guards: who asks without waiting fills a queue, and the engine parses YAML for minutes."""
    desk = Desk(tmp_path)
    going, asked = threading.Event(), threading.Event()
    desk.reloader.reload = lambda cause, sent, is_rehearsal: (asked.set(), going.wait(30), {"ok": True})[2]  # type: ignore[method-assign,assignment,misc]
    watch = ReloadWatch(desk.reloader, interval_s=30)
    first = watch.ask("POST")
    assert asked.wait(30)
    for _ in range(100):
        second = watch.ask("POST").result(0)
        assert (second["ok"], second["outcome"]) == (False, "busy")
    going.set()
    assert first.result(30) == {"ok": True} and watch._asked.empty()
    assert watch.ask("POST").result(30) == {"ok": True}
    watch.close()


def test_step_times_of_slo_are_watched(tmp_path: Path) -> None:
    """Guards: a new calibration that needs a restart; one that restarts a policy which does not predict."""
    times = {fmt: StepTime(0.012, 0.0004, 0.00025, 1.2e-6) for fmt in (BASE_FORMAT, "w8", "w4")}
    file = tmp_path / "times.json"
    write_whole(file, json.dumps(StepTimes(times, LayerMove(0.001, 0.002)).document()))
    rest = f"step_times: {file}\n"
    desk = Desk(tmp_path, "policy: {kind: threshold}\n" + rest)
    desk.look()
    write_whole(file, json.dumps(StepTimes(times, LayerMove(0.001, 0.003)).document()))
    desk.look()
    assert desk.taken == [] and desk.reloader.reloads.last_outcome is None
    desk.write("policy: {kind: slo}\n" + rest)
    desk.look()
    assert desk.taken[0][0].times is not None and len(desk.taken) == 1
    write_whole(file, json.dumps(StepTimes(times, LayerMove(0.001, 0.004)).document()))
    desk.look()
    assert len(desk.taken) == 2 and desk.taken[1][1].endswith("step times")


def test_thread_answers_and_ends(tmp_path: Path) -> None:
    """Guards: a question that waits for ever; a thread that outlives the engine."""
    desk = Desk(tmp_path)
    watch = ReloadWatch(desk.reloader, interval_s=0.001)
    desk.write(EDITED)
    assert watch.ask("SIGHUP").result(30)["ok"] and len(desk.taken) == 1
    assert desk.pauses, "two looks a second apart"
    seen = threading.Event()
    original = desk.reloader.look
    desk.reloader.look = lambda: (original(), seen.set())  # type: ignore[method-assign,assignment,func-returns-value]
    assert seen.wait(30)
    watch.close()
    watch.close()
    for thread in threading.enumerate():
        if thread.name == "morphserve-reload":
            thread.join(30)
            assert not thread.is_alive()
    assert watch.ask("late").result(0)["error"] == "the engine is shutting down"


def test_look_that_fails_is_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: the watch ends with the first surprise, or fills the log with it."""
    desk = Desk(tmp_path)
    looked, count = threading.Event(), [0]

    def look() -> None:
        count[0] += 1
        if count[0] > 3:
            looked.set()
        raise RuntimeError("planted")

    desk.reloader.look = look  # type: ignore[method-assign]
    watch = ReloadWatch(desk.reloader, interval_s=0.001)
    assert looked.wait(30) and watch.ask("SIGHUP").result(30)["ok"]
    watch.close()
    assert caplog.text.count("Traceback") == 1


def test_settings_without_a_file() -> None:
    """Guards: an exception, or a thread that watches nothing."""
    config = parse_config({})
    before = set(threading.enumerate())
    watch = ReloadWatch(
        PolicyReloader(None, config, setup_of(config), setup_of=setup_of, build=lambda setup: lambda note: None)
    )
    assert set(threading.enumerate()) <= before
    answer = watch.ask("SIGHUP").result(0)
    assert not answer["ok"] and "without a file" in answer["error"] and watch.reloads.source == "additional_config"
    watch.close()


class Counter:
    """A server without a file, and what it has handed over."""

    def __init__(self) -> None:
        self.taken: list[PolicySetup] = []
        config, ladder = parse_config({"ladder": {"order": "back_to_front"}}), Rig().ladder

        def build(setup: PolicySetup) -> Callable[[str], None]:
            try:
                setup.build(ladder)
            except ValueError as e:
                raise ConfigError(f"policy: {e}") from e
            return lambda note: self.taken.append(setup)

        self.reloader = PolicyReloader(None, config, setup_of(config), setup_of=setup_of, build=build)


@pytest.mark.parametrize(
    "sent",
    [
        '{"policy": {"kind": "static", "level": "8bit"}}',
        '{\n\t"policy": {"kind": "static",\n\t"level": "8bit"}}',
        "policy: {kind: static, level: 8bit} # at night\n",
    ],
)
def test_a_policy_that_is_sent_is_taken(sent: str) -> None:
    """Guards: defaults that need a restart to change; JSON as editors write it, which is no YAML for its tabs."""
    desk = Counter()
    watch = ReloadWatch(desk.reloader)
    answer = watch.ask("POST", sent).result(30)
    (setup,) = desk.taken
    assert answer == {
        "ok": True, "outcome": "ok", "error": None, "kind": "static", "changed": "policy.kind", "serves": setup.digest,
    }  # fmt: skip
    assert watch.ask("POST", sent).result(30)["outcome"] == "unchanged" and len(desk.taken) == 1
    watch.close()
    for thread in threading.enumerate():
        if thread.name == "morphserve-reload":
            thread.join(30)
            assert not thread.is_alive()
    assert watch.ask("late", sent).result(0)["error"] == "the engine is shutting down"


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ("policy: {kind: threshold, degrade_above: 7}", "degrade_above.*less than or equal to 1"),
        ("policy: {kind: threshold, max_level: int8}", "'int8'.*8bit, 4bit"),
        ("policy: {kind: fast}", "kind"),
        ("policy: {kind: slo}\nkv: {max_preemptions: 1}", "policy, kv, must be `policy` alone"),
        ("- policy", "top level is list"),
        ("# nothing", "top level is NoneType"),
        ("{}", "top level is empty"),
        ("policy: [", "expected the node content"),
        ("policy: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("[" * 20_000, "recursion|nested"),
        ('{"policy": ' + '{"a":' * 20_000, "recursion|flow mapping|nested"),
        ("a: &a [x, x]\nb: &b [*a, *a]\npolicy: {kind: *b}", "aliases"),
        ('{"policy": {"kind": "static", "level": "' + "x" * 60_000 + '"}}', "level 'xxx"),
    ],
)  # fmt: skip
def test_a_bad_policy_that_is_sent_changes_nothing(sent: str, words: str) -> None:
    """Guards: an engine that a POST ends or keeps busy; a page of YAML's complaints in place of one line."""
    desk = Counter()
    answer = desk.reloader.reload("POST", sent)
    assert not answer["ok"] and answer["outcome"] == "refused" and desk.taken == []
    assert re.search(words, answer["error"]) and "\n" not in answer["error"], answer["error"][:600]
    assert len(answer["error"]) < 700 and answer["kind"] == "slo"
    assert desk.reloader.reloads.refused == 1


@pytest.mark.parametrize("sent", ["policy: {kind: static}", "policy: {kind: static, level: 77}", "policy: ["])
def test_a_rehearsal_says_what_would_come_of_it(sent: str) -> None:
    """Guards: replicas of which one refuses a policy that the others have taken meanwhile; a rehearsal that is content
    with what cannot be built, and one that counts as a reload."""
    desk = Counter()
    before = desk.reloader.reloads
    answer = desk.reloader.reload("POST", sent, is_rehearsal=True)
    assert desk.taken == [] and answer["serves"] == before.serves and answer["kind"] == "slo"
    if answer["ok"]:
        assert answer["outcome"] == "checked" and desk.reloader.reloads == before
    again = desk.reloader.reload("POST", sent)
    assert again["ok"] == answer["ok"] == (sent == "policy: {kind: static}") and again["error"] == answer["error"]
    assert len(desk.taken) == desk.reloader.reloads.reloads == int(again["ok"])
    assert (again["serves"] != before.serves) == again["ok"]


def test_what_is_served_has_one_digest() -> None:
    """Guards: replicas said to differ whose files name the same in another order; others said to be alike."""
    def digest(text: str) -> str:
        return setup_of(parse_config({"policy": {"kind": "static", **json.loads(text)}})).digest

    one, other = ('{"floors": {"models": {"a": 1, "b": 2}}}', '{"floors": {"models": {"b": 2, "a": 1}}}')
    assert digest(one) == digest(other) != digest("{}") and len(digest(one)) == 8


def test_a_file_is_not_overruled(tmp_path: Path) -> None:
    """Guards: a policy from two places, of which the next look at the file would undo one."""
    desk = Desk(tmp_path)
    answer = desk.reloader.reload("POST", "policy: {kind: static}")
    assert not answer["ok"] and "the settings are in a file: edit it" in answer["error"] and desk.taken == []


# ---- the controller


class Recorder(ScriptedPolicy):
    """Follows the engine where nobody tells it otherwise."""

    follows = True

    def decide(self, signals: Any) -> Any:
        if self.follows and self.seen is None:
            self.level = signals.target_level
        return super().decide(signals)


def test_new_policy_is_asked_from_the_next_tick(tmp_path: Path) -> None:
    """Guards: a policy asked in the middle of a step, the old one asked on, or the log that does not know."""
    path = tmp_path / "log"
    first = PolicySetup(ThresholdConfig(kind="threshold"), None, LIMITS)
    second = PolicySetup(ThresholdConfig(kind="threshold", mode="performance", restore_after_s=0.1), None, LIMITS)
    rig = Rig()
    log = DecisionLog(path, make_header(first, rig.ladder))
    rig = Rig(policy=first.build(rig.ladder), log=log)
    rig.pool.allocate(1, 18)
    rig.step(10)
    reached = rig.controller.level
    assert reached > 0
    rig.controller.replace_policy(second.build(rig.ladder), "edited", second)
    rig.step(10)
    assert rig.controller.level >= reached
    rig.pool.finish(1)
    rig.step(100)
    assert rig.controller.level == 0 and not rig.controller.failed
    log.close()
    found = replay(path)
    assert found.agrees and found.compared == 120 and found.policies == ["threshold default", "threshold performance"]


@pytest.mark.parametrize("policy", ["threshold", "threshold_without_dwell", "slo"])
@pytest.mark.parametrize("burst", [True, False])
def test_new_policy_goes_on_from_the_level(policy: str, burst: bool) -> None:
    """Guards: a policy that believes the engine at level 0, so a restore in the middle of the burst that it is for."""
    rig = Rig()
    rig.go_to(3)
    if burst:
        rig.pool.allocate(1, rig.pool.num_kv_blocks - 3)
    setups = {
        "threshold": PolicySetup(ThresholdConfig(kind="threshold"), None, LIMITS),
        "threshold_without_dwell": PolicySetup(ThresholdConfig(kind="threshold", restore_after_s=0), None, LIMITS),
        "slo": _slo(),
    }
    rig.controller.replace_policy(setups[policy].build(rig.ladder), "edited", setups[policy])
    levels = []
    for _ in range(20):
        rig.step()
        levels.append(rig.controller.level)
    assert not rig.controller.failed
    if burst:
        assert min(levels) >= 3
    elif policy == "threshold":
        assert levels == [3] * 20  # 1 s is not the dwell
    status = rig.controller.status()
    assert burst or policy != "threshold_without_dwell" or "start at full precision" not in status["reason"]


def _slo() -> PolicySetup:
    times = {fmt: StepTime(0.012, 0.0004, 0.00025, 1.2e-6) for fmt in (BASE_FORMAT, "w8", "w4")}
    return PolicySetup(SloConfig(kind="slo"), StepTimes(times, LayerMove(0.001, 0.002)), LIMITS)


@pytest.mark.parametrize("direction", ["degrade", "restore"])
@pytest.mark.parametrize("steps", range(1, 8))
def test_transition_under_way_goes_on(direction: str, steps: int) -> None:
    """Guards: a reload in mid-transition turns it around, aborts it, or leaves fenced blocks or staged layers."""
    rig = Rig(num_ranks=2)
    if direction == "restore":
        rig.go_to(4)
    rig.script.level = 4 if direction == "degrade" else 0
    rig.step(steps)
    new = Recorder()
    rig.controller.replace_policy(new, "edited", _slo())
    rig.step(60)
    assert new.level == (4 if direction == "degrade" else 0) == rig.controller.level
    assert rig.controller.phase is Phase.IDLE and not rig.controller.failed
    outcomes = {key: n for key, n in rig.controller.counters.transitions.items() if key[1] != "committed"}
    assert outcomes == {}


def test_two_before_one_tick(tmp_path: Path) -> None:
    """Guards: the earlier of two edits wins, or both are asked."""
    rig = Rig()
    first, second = Recorder(), Recorder()
    rig.controller.replace_policy(first, "one", _slo())
    rig.controller.replace_policy(second, "two", _slo())
    rig.step()
    assert first.seen is None and second.seen is not None and rig.script.seen is None


def test_failed_controller_refuses() -> None:
    """Guards: "ok" for a policy that nobody will ask."""
    rig = Rig()
    rig.script.error = RuntimeError("planted")
    rig.step()
    with pytest.raises(ConfigError, match="no policy is asked any more. Restart"):
        rig.controller.replace_policy(Recorder(), "edited", _slo())
    assert not rig.controller.wants_wakeup


def test_idle_engine_is_woken_for_it() -> None:
    """Guards: an idle server at level 0 that takes `static: w8` with the next request, an hour later."""
    rig = Rig()
    rig.step()
    assert not rig.controller.wants_wakeup
    rig.controller.replace_policy(Recorder(), "edited", _slo())
    assert rig.controller.wants_wakeup
    rig.step()
    assert not rig.controller.wants_wakeup
