"""The variant store: what it returns is what it was given, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import IO

import pytest
import torch

from quant_layers import StoreError, VariantStore, digest
from quant_layers.store.tensorfile import read_file, write_file

_ROOT = Path(__file__).resolve().parents[2]
Tensors = dict[str, dict[str, torch.Tensor]]


def _layer(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "self_attn.qkv_proj": {
            "weight": torch.randint(-127, 128, (64, 36), generator=generator, dtype=torch.int8),
            "scale": torch.rand(64, generator=generator),
        },
        "mlp.down_proj": {
            "weight": torch.randn(32, 64, generator=generator).bfloat16(),
            "bias": torch.randn(32, generator=generator).bfloat16(),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(seed),
            "float8": torch.randn(8, 3, generator=generator).to(torch.float8_e4m3fn),
        },
    }


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("layer-"))


def test_layers_come_back_byte_identical_in_another_process_lifetime(tmp_path: Path) -> None:
    """Guards against lost bytes, dtypes, shapes or names between a start and the next."""
    given = _layer()
    given["mlp.down_proj"]["strided"] = torch.arange(12.0).view(3, 4).t()
    VariantStore.open(tmp_path / "rank", "fp").write(3, "w8", given, kernel="k1")
    store = VariantStore.open(tmp_path / "rank", "fp", {"w8": "k1"})
    back = store.read(3, "w8")
    assert digest(back) == digest(given)
    assert back["mlp.down_proj"]["scalar"].shape == ()
    assert store.has(3, "w8") and store.has(3, "w8", kernel="k1")
    assert not store.has(3, "w8", kernel="k2") and not store.has(3, "w4") and not store.has(4, "w8")
    assert store.nbytes(3, "w8") == sum(t.nbytes for parts in given.values() for t in parts.values())


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    """Guards against a private dialect: the file must open with the public library."""
    from safetensors.torch import load_file

    given = _layer()
    row = VariantStore.open(tmp_path, "fp").write(0, "base", given)
    loaded = load_file(tmp_path / row.file)
    assert torch.equal(loaded["mlp.down_proj/weight"], given["mlp.down_proj"]["weight"])
    assert torch.equal(loaded["mlp.down_proj/float8"].float(), given["mlp.down_proj"]["float8"].float())
    assert len(loaded) == 7


def test_tensors_own_their_memory(tmp_path: Path) -> None:
    """Guards against tensors that share one buffer (a kept scale would keep the weight) or map the file."""
    store = VariantStore.open(tmp_path, "fp")
    row = store.write(0, "w8", _layer())
    before = digest(first := store.read(0, "w8"))
    for parts in first.values():
        for tensor in parts.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert row.file not in Path("/proc/self/maps").read_text()
    first["mlp.down_proj"]["weight"].zero_()
    assert digest(store.read(0, "w8")) == before


def test_digest_sees_every_difference() -> None:
    """Guards against a digest that would call changed weights identical."""
    base = digest(_layer())
    assert digest(_layer()) == base
    flipped, renamed, retyped, reshaped = (_layer() for _ in range(4))
    flipped["self_attn.qkv_proj"]["weight"][5, 5] += 1
    renamed["other"] = renamed.pop("mlp.down_proj")
    retyped["self_attn.qkv_proj"]["scale"] = retyped["self_attn.qkv_proj"]["scale"].view(torch.int32)
    reshaped["self_attn.qkv_proj"]["scale"] = reshaped["self_attn.qkv_proj"]["scale"].view(8, 8)
    assert len({base, *map(digest, (flipped, renamed, retyped, reshaped))}) == 5


def test_truncated_missing_and_changed_files_are_refused(tmp_path: Path) -> None:
    """Guards against serving damaged weights: path, found and expected are named."""
    store = VariantStore.open(tmp_path, "fp")
    row = store.write(0, "w8", _layer())
    path = tmp_path / row.file
    whole = path.read_bytes()

    path.write_bytes(whole[:-7])
    for check in (lambda: store.read(0, "w8"), store.verify):
        with pytest.raises(
            StoreError, match=f"{row.file} has {row.size - 7:,} bytes, expected {row.size:,}.*delete"
        ):
            check()

    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # same size: only the hash can tell
    with pytest.raises(StoreError, match=f"sha256 .*expected {row.sha256}"):
        store.verify()

    path.unlink()
    again = VariantStore.open(tmp_path, "fp")
    for check in (lambda: again.read(0, "w8"), again.verify):
        with pytest.raises(
            StoreError, match=f"{row.file}: expected {row.size:,} bytes.*No such file.*delete"
        ):
            check()


@pytest.mark.parametrize("where", ["tensor", "dtype"])
def test_what_changed_after_the_start_is_refused(tmp_path: Path, where: str) -> None:
    """Guards against a file changed in place while a server runs, of the same size and structure: served as a variant,
    or restored as a level 0 that is stock's no more."""
    store = VariantStore.open(tmp_path, "fp")
    path = tmp_path / store.write(0, "base", _layer()).file
    store.verify()
    content = path.read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1]) if where == "tensor" else content.replace(b'"BF16",', b'"F16", ')
    with path.open("r+b") as file:
        file.write(changed)
    with pytest.raises(StoreError, match=f"{re.escape(path.name)} is damaged: .* has changed since it was verified"):
        store.read(0, "base")
    assert len(changed) == len(content) and changed != content
    path.write_bytes(content)
    assert digest(store.read(0, "base")) == digest(_layer())


def test_a_want_of_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an operator who is told to delete a file because there was no memory to read it into."""
    store = VariantStore.open(tmp_path, "fp")
    store.write(0, "base", _layer())

    def no_memory(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("quant_layers.store.layer_store.read_file", no_memory)
    with pytest.raises(StoreError, match="cannot read .*Free memory") as met:
        store.read(0, "base")
    assert "delete" not in str(met.value)


@pytest.mark.parametrize("position", [0, 9, 40])
def test_a_damaged_header_is_refused(tmp_path: Path, position: int) -> None:
    """Guards against reading past the header's own claims when the size happens to be right."""
    store = VariantStore.open(tmp_path, "fp")
    path = tmp_path / store.write(0, "w8", _layer()).file
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match="damaged|holds"):
        store.read(0, "w8")


def test_other_weights_and_other_schemas_are_refused(tmp_path: Path) -> None:
    """Guards against running another model's variants, or this one's other slice."""
    VariantStore.open(tmp_path, "mine").write(0, "w8", _layer())
    with pytest.raises(StoreError, match="fingerprint 'mine', expected 'other'.*another directory"):
        VariantStore.open(tmp_path, "other")
    manifest = tmp_path / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "schema": 99}))
    with pytest.raises(StoreError, match="schema 99, expected 2"):
        VariantStore.open(tmp_path, "mine")
    manifest.write_text('{"schema": 1')
    with pytest.raises(StoreError, match="manifest.json cannot be read"):
        VariantStore.open(tmp_path, "mine")


def test_too_little_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against filling the disk: needed and free bytes are named and nothing is left behind."""
    store = VariantStore.open(tmp_path, "fp")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 3, 7))
    with pytest.raises(StoreError, match=r"needs 1,0\d\d,\d\d\d bytes, free are 7"):
        store.write(0, "w8", _layer())
    assert not _names(tmp_path) and not store.has(0, "w8")


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    """Guards against a bare OSError from a mistyped path."""
    (tmp_path / "x").write_text("")
    with pytest.raises(StoreError, match="cannot create the variant directory"):
        VariantStore.open(tmp_path / "x", "fp")


def test_unknown_layers_name_what_is_there(tmp_path: Path) -> None:
    """Guards against a bare KeyError for a format that was never built."""
    store = VariantStore.open(tmp_path, "fp")
    store.write(2, "w8", _layer())
    with pytest.raises(StoreError, match=r"no 'w4' of layer 2, found \['w8'\]"):
        store.read(2, "w4")


def test_names_that_would_collide_are_refused(tmp_path: Path) -> None:
    """Guards against 'a/b' + 'c' and 'a' + 'b/c' becoming one name in the file."""
    store = VariantStore.open(tmp_path, "fp")
    with pytest.raises(StoreError, match="without '/'"):
        store.write(0, "w8", {"a/b": {"c": torch.zeros(1)}})


def test_verify_reports_progress_up_to_the_total(tmp_path: Path) -> None:
    """Guards against a progress bar that never ends or runs over."""
    store = VariantStore.open(tmp_path, "fp")
    rows = [store.write(i, "w8", _layer(i)) for i in range(3)]
    seen: list[tuple[int, int]] = []
    store.verify(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(r.size for r in rows),) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


class _Crash(BaseException):
    """Stands for the process ending: nothing that handles errors may see it."""


@pytest.mark.parametrize("step", ["replace-1", "replace-2", "fsync-1", "fsync-2", "fsync-3"])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Guards against a manifest that names a file which is not whole, and against litter that grows."""
    old, new = _layer(1), _layer(2)
    VariantStore.open(tmp_path, "fp").write(0, "w8", old)
    store = VariantStore.open(tmp_path, "fp")
    function, _, count = step.partition("-")
    real, calls = getattr(os, function), [0]

    def crash(*args: object) -> object:
        calls[0] += 1
        if calls[0] == int(count):
            raise _Crash
        return real(*args)

    monkeypatch.setattr(os, function, crash)
    with pytest.raises(_Crash):
        store.write(0, "w8", new)
    monkeypatch.undo()

    after = VariantStore.open(tmp_path, "fp")
    after.verify()
    assert digest(after.read(0, "w8")) in (digest(old), digest(new))
    assert _names(tmp_path) == [after.entry(0, "w8").file]
    after.write(0, "w8", new)
    assert digest(VariantStore.open(tmp_path, "fp").read(0, "w8")) == digest(new)
    assert len(_names(tmp_path)) == 1


def test_a_full_disk_during_the_write_keeps_the_old_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against losing what was stored when the disk fills up between the check and the write."""
    store = VariantStore.open(tmp_path, "fp")
    store.write(0, "w8", _layer(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.write(0, "w8", _layer(2))
    monkeypatch.undo()
    assert digest(store.read(0, "w8")) == digest(_layer(1))
    assert len(_names(tmp_path)) == 1


_WRITER = """
import sys, torch
from quant_layers import VariantStore
store = VariantStore.open(sys.argv[1], "fp")
print("ready", flush=True)
sys.stdin.readline()
for layer in range(12):
    weight = torch.full((64, 64), layer, dtype=torch.int8)
    own = torch.full((64,), int(sys.argv[2]), dtype=torch.int8)
    store.write(layer, "w8", {"l": {"w": weight}})
    store.write(100 + layer + 50 * int(sys.argv[2]), "w8", {"l": {"w": own}})
"""


def test_two_processes_build_one_cache(tmp_path: Path) -> None:
    """Guards against two servers that start at once and lose or tear each other's layers."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n", timeout=120)
        assert writer.returncode == 0
    store = VariantStore.open(tmp_path, "fp")
    store.verify()
    assert len(store.entries()) == 12 + 2 * 12
    for row in store.entries():
        (values,) = store.read(row.layer, "w8").values()
        expected = row.layer if row.layer < 100 else (row.layer - 100) // 50
        assert (values["w"] == expected).all()
    assert len(_names(tmp_path)) == 36


def test_a_write_holds_the_lock_until_the_manifest_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against two writers in the critical section at once, which rarely loses a layer by itself."""
    store = VariantStore.open(tmp_path, "fp")
    real, refused = os.replace, []

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        with (tmp_path / ".lock").open("w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(target.name)

    monkeypatch.setattr(os, "replace", replace)
    row = store.write(0, "w8", _layer())
    assert refused == [row.file, "manifest.json"]
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and free again afterwards


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """Guards against a link in the cache that has a start empty, or create, a file anywhere."""
    (tmp_path / "rank").mkdir()
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "rank/.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match="cannot lock the variant directory"):
        VariantStore.open(tmp_path / "rank", "fp")
    assert (tmp_path / "mine").read_text() == "precious"


class _ReleaseOnWord(logging.Handler):
    """Gives a lock back once somebody says that he waits for it."""

    def __init__(self, held: IO[bytes]) -> None:
        super().__init__()
        self._held = held

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting for another process" in record.getMessage():
            self._held.close()


def test_a_wait_for_another_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a start that stands still for ever, without a word, behind a process that was forgotten."""
    monkeypatch.setattr("quant_layers.private._SILENT_S", 0)
    held = (tmp_path / ".lock").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    word = _ReleaseOnWord(held)
    logging.getLogger("vllm.morphserve").addHandler(word)
    try:
        with caplog.at_level(logging.INFO, logger="vllm.morphserve"):
            VariantStore.open(tmp_path, "fp").write(0, "w8", _layer())
    finally:
        logging.getLogger("vllm.morphserve").removeHandler(word)
    assert held.closed


def test_a_model_is_kept_for_its_user_alone(tmp_path: Path) -> None:
    """Guards against weights that lay in a closed directory, copied to where every user of the machine reads them."""
    before = os.umask(0)
    try:
        VariantStore.open(tmp_path / "cache/variants/rank", "fp").write(0, "w8", _layer())
    finally:
        os.umask(before)
    made = (tmp_path / "cache", tmp_path / "cache/variants", tmp_path / "cache/variants/rank")
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    """Guards against a file whose header describes less than it holds."""
    path = tmp_path / "x.safetensors"
    write_file(path, _layer())
    path.write_bytes(path.read_bytes() + b"more")
    with (
        path.open("rb", buffering=0) as file,
        pytest.raises(StoreError, match="its header describes .* bytes, the file has"),
    ):
        read_file(path, file)


def test_what_was_verified_outlives_its_directory(tmp_path: Path) -> None:
    """Guards against a cache that is cleaned while a server runs: no layer could be restored any more."""
    store = VariantStore.open(tmp_path / "rank", "fp")
    for layer in range(2):
        store.write(layer, "w8", _layer(layer))
    store.verify()
    shutil.rmtree(tmp_path / "rank")
    for _ in range(2):
        assert [digest(store.read(layer, "w8")) for layer in range(2)] == [digest(_layer(i)) for i in range(2)]
    rebuilt = VariantStore.open(tmp_path / "rank", "fp")  # and the next start is not in the way
    assert not rebuilt.has(0, "w8")
    rebuilt.write(0, "w8", _layer(7))
    assert digest(store.read(0, "w8")) == digest(_layer(0))


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_are_closed_with_their_store(tmp_path: Path) -> None:
    """Guards against descriptors that pile up: one a file while held, none a read, none afterwards."""
    store = VariantStore.open(tmp_path, "fp")
    for layer in range(3):
        store.write(layer, "w8", _layer(layer))
    before = _descriptors()
    store.read(0, "w8")
    assert _descriptors() == before
    for _ in range(2):
        store.verify()
        store.read(0, "w8")
        assert _descriptors() == before + 3
    del store
    assert _descriptors() == before


def test_too_few_descriptors_are_left_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a deep model whose files take the descriptors that connections need."""
    monkeypatch.setattr("resource.getrlimit", lambda _: (5, 5))
    store = VariantStore.open(tmp_path, "fp")
    for layer in range(3):
        store.write(layer, "w8", _layer(layer))
    before = _descriptors()
    store.verify()
    assert _descriptors() == before and digest(store.read(2, "w8")) == digest(_layer(2))
    assert "3 variant files, but only 5 files may be open" in caplog.text and "ulimit -n to 6" in caplog.text


def test_kernels_share_a_directory_and_see_their_own(tmp_path: Path) -> None:
    """Guards against two machines with one home directory: a layout read by the wrong kernel computes garbage,
    and packing anew at each start would take the files from the other's running server."""
    here = VariantStore.open(tmp_path, "fp", {"w8": "vnni"})
    here.write(0, "base", _layer(0))
    here.write(0, "w8", _layer(1), "vnni")
    there = VariantStore.open(tmp_path, "fp", {"w8": "onednn"})
    assert there.has(0, "base") and there.has(0, "w8", "vnni")
    assert not there.has(0, "w8") and not there.has(0, "w8", "onednn")
    with pytest.raises(StoreError, match=r"no 'w8' for kernel 'onednn' of layer 0, found \['base', 'w8 \(vnni\)'\]"):
        there.read(0, "w8")
    there.write(0, "w8", _layer(2), "onednn")
    for kernel, seed in (("vnni", 1), ("onednn", 2)):
        again = VariantStore.open(tmp_path, "fp", {"w8": kernel})
        again.verify()
        assert digest(again.read(0, "w8")) == digest(_layer(seed))
        assert [(row.format, row.kernel) for row in again.entries()] == [("base", ""), ("w8", kernel)]
    assert len(_names(tmp_path)) == 3


def test_the_manifest_hash_is_the_files(tmp_path: Path) -> None:
    """Guards against a hash of anything but the bytes on disk."""
    row = VariantStore.open(tmp_path, "fp").write(0, "w8", _layer())
    assert hashlib.sha256((tmp_path / row.file).read_bytes()).hexdigest() == row.sha256
