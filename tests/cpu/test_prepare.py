"""`morphserve prepare`: each part is made once, kept where a server finds it, and gone on with after a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cpu.prepared_world import PLACE, TIMES, keep_profile, make_model

from morphserve.config import load_config
from morphserve.errors import ProfilingError
from morphserve.prepared import TAKEN, ProfileKey, Store, take_model, weights_fingerprint
from morphserve.tools.prepare import main, request, stages
from quant_layers import QuantError

pytestmark = pytest.mark.cpu


class Machine:
    """Stands for the processes that ask vLLM, quantize, measure and time; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.commands: list[list[str]] = []
        self.job: Any = None
        self.settings: Any = None  # of what times steps
        self.dies_at = ""
        self.with_profile = True

    def run_apart(self, command: Sequence[str], failed: str, what: str, progress: Any) -> dict[str, Any]:
        self._begin(what, list(command))
        progress(what, 1, 2)
        if "asking" in what:
            formats = ["w8", "w4"] if self.with_profile else ["w4"]
            more = {"in_pages": False, "levels_of_a_format": None, "with_profile": self.with_profile}
            return {"place": asdict(PLACE), "formats": formats, **more}
        out = Path(command[command.index("--out") + 1])
        if "quantizing" in what:
            out.mkdir()
            return {"checkpoint": str(out)}
        self.settings = load_config(command[command.index("--config") + 1])
        out.write_text(json.dumps(TIMES.document()))
        return {"place": asdict(PLACE)}

    def run_profile(self, job: Any, measure: Sequence[str], texts: Sequence[Path], progress: Any) -> None:
        self._begin("profile", list(measure))
        self.job = job
        store = Store(job.out.parents[2], weights_fingerprint(Path(job.model)) or "")
        key = ProfileKey(job.formats, PLACE.dtype, PLACE.tier, dict(job.sources))
        keep_profile(store, key, text=[file.name for file in job.text])

    def _begin(self, what: str, command: list[str]) -> None:
        if self.dies_at and self.dies_at in what:
            raise KeyboardInterrupt
        self.asked.append(what)
        self.commands.append(command)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    from morphserve.tools import profile

    found = Machine()
    monkeypatch.setattr(stages, "run_apart", found.run_apart)
    monkeypatch.setattr(profile, "run_profile", found.run_profile, raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")  # put back when a test is over, --cpu-bind sets it
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def prepare(model: Path, *words: str) -> int:
    return main([str(model), "--dtype", "bfloat16", "--cache-dir", str(model.parent / "cache"), "--json", *words])


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_all_parts_are_made_once(model: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a second call that measures for minutes what is there, or entries that no server finds."""
    assert prepare(model) == 0
    document = last(capsys)
    assert machine.asked == ["asking vLLM", "profile", "timing steps"] and document["made"] == ["profile", "times"]
    assert machine.job.out == Path(document["profile"]) and Path(document["step_times"]).is_file()
    store = Store(model.parent / "cache", document["weights"])
    (profile,), (times,) = store.profiles(), store.times()
    assert str(profile.directory) == document["profile"] and times.place == PLACE and store.problems == []
    assert prepare(model) == 0
    out = capsys.readouterr().out
    assert len(machine.asked) == 3 and "prepared already" in out and json.loads(out.splitlines()[-1])["made"] == []


def test_steps_are_timed_with_what_was_made(model: Path, machine: Machine, tmp_path: Path) -> None:
    """Guards: steps timed with another profile, or in another cache, where a name means something in YAML."""
    cache = tmp_path / "cache: of #1"
    assert main([str(model), "--dtype", "bfloat16", "--cache-dir", str(cache)]) == 0
    assert machine.settings.cache_dir == cache and machine.settings.profile == machine.job.out


def test_a_machine_without_memory_for_the_weights_is_refused(
    model: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: minutes of work that the kernel ends without a word, and another user's processes with it."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    monkeypatch.setattr("kv_resize.available_bytes", lambda: weights - 1)
    assert prepare(model) == 1
    said = capsys.readouterr().err
    assert "GiB of weights" in said and "Free some, raise the limit" in said and machine.asked == ["asking vLLM"]
    monkeypatch.setattr("kv_resize.available_bytes", lambda: weights)
    assert prepare(model) == 0


@pytest.mark.parametrize("part", ["asking", "profile", "timing"])
def test_a_killed_run_goes_on(
    model: Path, machine: Machine, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    """Guards: finished parts that are lost with the one that was not."""
    machine.dies_at = part
    assert prepare(model) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    machine.dies_at = ""
    assert prepare(model) == 0
    assert machine.asked == ["asking vLLM", "profile", "timing steps"], "each once in both runs"


def test_the_server_that_is_meant_is_the_one_that_is_measured(model: Path, machine: Machine) -> None:
    """Guards: step times and levels of one rank, of a compiled engine or of smaller steps than the server's."""
    words = ("-tp", "2", "--enforce-eager", "--max-num-seqs", "128", "--max-num-batched-tokens", "512")
    assert prepare(model, *words, "--cpu-bind", "0|1") == 0
    asking, measuring, timing = (" ".join(command) for command in machine.commands)
    for command in (asking, measuring, timing):
        assert "--dtype bfloat16" in command and "-tp 2 -pp 1" in command
    assert "--enforce-eager" in asking and "--enforce-eager" in timing and "--compiled" not in measuring
    assert "--max-num-seqs 128" in timing and "--max-num-batched-tokens 512" in timing and "--cpu-bind 0|1" in timing
    machine.commands.clear()
    assert prepare(model) == 0
    assert "--enforce-eager" not in " ".join(machine.commands[0])


def test_a_checkpoint_is_made_measured_and_kept_with_the_profile(model: Path, machine: Machine) -> None:
    """Guards: levels that were measured with other 4 bits than are served; minutes of quantizing done twice."""
    machine.dies_at = "profile"
    assert prepare(model, "--with-w4", "awq") == 130
    machine.dies_at = ""
    assert prepare(model, "--with-w4", "awq") == 0
    assert machine.asked == ["asking vLLM", "quantizing with AWQ", "profile", "timing steps"]
    (profile,) = Store(model.parent / "cache", weights_fingerprint(model) or "").profiles()
    assert f"--variant w4={profile.variants['w4']}" in " ".join(machine.commands[2])
    assert Path(profile.variants["w4"]).is_dir()


def test_a_damaged_profile_is_made_again(
    model: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a server that sends its user to a command which then trips over what is damaged."""
    assert prepare(model) == 0
    profile = Path(last(capsys)["profile"])
    (profile / "manifest.json").write_text("{}")
    assert prepare(model) == 0
    assert last(capsys)["made"] == ["profile"]
    assert [each.directory for each in Store(model.parent / "cache", weights_fingerprint(model) or "").profiles()] == [
        profile
    ]


@pytest.mark.parametrize("is_lasting", [True, False])
@pytest.mark.parametrize("file", ["manifest.json", "smoothing.safetensors"])
def test_a_profile_that_cannot_be_read_now_is_kept(
    model: Path, machine: Machine, file: str, is_lasting: bool, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards: hours of measuring deleted because a network disk was away for a moment, or a limit was reached."""
    prepare(model)
    profile, num_asked = Path(last(capsys)["profile"]), len(machine.asked)
    failures, real = iter([True] * (9 if is_lasting else 1)), Path.open

    def away(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == profile / file and next(failures, False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", away)
        assert prepare(model) == 1
    assert str(profile) in (said := capsys.readouterr().err) and "It stays" in said
    assert len(machine.asked) == num_asked and prepare(model) == 0 and len(machine.asked) == num_asked


def test_a_profile_of_another_text_is_named(
    model: Path, machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Guards: somebody's own text, given after the profile was made, that counts for nothing and nobody says so."""
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "theirs.txt").write_text("theirs")
    assert prepare(model, "--text", str(tmp_path / "mine.txt")) == 0
    for words, said in (("mine.txt", False), ("theirs.txt", True)):
        capsys.readouterr()
        assert prepare(model, "--text", str(tmp_path / words)) == 0
        assert ("was made of mine.txt, and stays" in capsys.readouterr().out) is said


def test_step_times_may_be_left_out(model: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: minutes of timing that nobody asked for."""
    assert prepare(model, "--without-times") == 0
    assert machine.asked == ["asking vLLM", "profile"] and last(capsys)["step_times"] is None


def test_a_model_of_8_bits_has_only_its_step_times(
    model: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: minutes of profiling for what such a server refuses, or no step times for it; options that ask for more
    than there will be, ignored."""
    machine.with_profile = False
    assert prepare(model) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert machine.asked == ["asking vLLM", "timing steps"] and document["made"] == ["times"]
    assert document["profile"] is None and "only step times are prepared" in out and "measure-kl" in out
    for option in (("--with-w4", "awq"), ("--without-times",)):
        assert prepare(model, *option) == 1
        said = capsys.readouterr().err
        assert f"Leave out {' '.join(option)}" in said and said.count("\n") == 1


def test_another_gpu_or_build_of_vllm_is_asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards: step times of one GPU kept as another's of the same host, or a CPU build's answer taken for a GPU's."""
    asked = request.Request("model", "auto", 1, 1, False, 2048, 64, None)
    information = tmp_path / "0000:01:00.0" / "information"
    information.parent.mkdir()
    monkeypatch.setattr(request, "_NVIDIA", tmp_path)
    names = set()
    for build, visible, model in (
        ("0.32.0+cpu", "", ""), ("0.32.0", "", ""), ("0.32.0", "", "NVIDIA L4"), ("0.32.0", "", "NVIDIA H100"),
        ("0.32.0", "1", "NVIDIA H100"),
    ):  # fmt: skip
        monkeypatch.setattr(request, "installed_version", lambda name, build=build: build)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        information.write_text(f"Model: \t {model}\n")
        names.add(asked.name)
        assert asked.name in names, "the same each time"
    assert len(names) == 5


def test_two_at_once_are_refused(model: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a run by hand that mixes its layers into those of an idle server's child."""
    store = Store(model.parent / "cache", weights_fingerprint(model) or "")
    store.directory.mkdir(parents=True)
    with take_model(store.directory):
        assert prepare(model) == TAKEN
    assert "another process prepares this model" in capsys.readouterr().err and machine.asked == []
    assert prepare(model) == 0


@pytest.mark.parametrize("what", ["disk", "text", "weights", "cache", "model"])
def test_what_cannot_be_is_refused_in_one_line(
    model: Path, machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Guards: minutes of work that end for want of room; a traceback for a wrong name."""
    words: tuple[str, ...] = ()
    said = {"disk": "GiB free", "text": "No such file", "weights": "Fetch the model again", "cache": "can be written",
            "model": "neither a directory nor a hub"}[what]  # fmt: skip
    if what == "disk":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    elif what == "text":
        words = ("--text", "/no/such/text")
    elif what == "weights":
        (model / "model-0.safetensors").unlink()
    elif what == "cache":
        (model.parent / "cache").write_text("")
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        model = model.parent / "no such model"
    assert prepare(model, *words) == 1
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") <= 2 and "Traceback" not in captured.err
    assert "profile" not in machine.asked and captured.out == ""


def test_a_part_that_fails_says_why(
    model: Path, machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an engine's stack instead of a line, or a preparation that counts as done."""

    for error in (ProfilingError("the levels could not be measured (vLLM said: no room)."), QuantError("no room")):

        def refuse(*args: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("morphserve.tools.profile.run_profile", refuse)
        assert prepare(model) == 1
        assert "no room" in capsys.readouterr().err


def test_what_is_made_is_this_users_alone(model: Path, machine: Machine) -> None:
    """Guards: a checkpoint made of a model that lay in a closed directory, where every user of the machine reads it."""
    before = os.umask(0)
    try:
        assert prepare(model, "--with-w4", "awq") == 0
    finally:
        os.umask(before)
    (profile,) = Store(model.parent / "cache", weights_fingerprint(model) or "").profiles()
    for directory in (profile.directory.parent, model.parent / "cache" / "prepared", model.parent / "cache"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory
