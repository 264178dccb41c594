"""How our C++ operators are built: for one tier of CPUs and no other, once, and never at the price of a crash."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import select
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from quant_layers.kernels import int16, native

TIERS = ("avx2", "avx512", "vnni")


def _why_no_compiler() -> str:
    try:
        native.find_compiler(openmp=True)
    except (FileNotFoundError, RuntimeError) as e:
        return str(e)
    return ""


needs_compiler = pytest.mark.skipif(bool(_why_no_compiler()), reason=_why_no_compiler())


def _capabilities(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))


AVX2 = ("avx2", "fma3", "f16c")
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")


@pytest.mark.parametrize(
    ("has", "tier"),
    [
        (("sse4_2", "avx"), ""),
        (("avx2", "fma3"), ""),
        (AVX2, "avx2"),
        ((*AVX2, "avx512_f"), "avx2"),  # an early AVX-512 without byte and word instructions
        ((*AVX2, "avx512_vnni"), "avx2"),
        (AVX512, "avx512"),
        ((*AVX512, "avx512_vnni", "avx512_bf16", "amx_tile"), "vnni"),
    ],
)
def test_the_tier_is_what_torch_says_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, has: tuple[str, ...], tier: str
) -> None:
    """Guards: an illegal instruction on a CPU that has only part of a tier, and emulation that our code ignores."""
    _capabilities(monkeypatch, *has)
    assert int16.tier() == tier
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert int16.tier() == ""


def _instructions(tier: str, directory: Path) -> str:
    """All that is compiled for a tier, disassembled."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump: install binutils")
    compiler, texts = native.find_compiler(openmp=True), []
    for index, unit in enumerate(int16.units(tier)):
        target = directory / f"{index}.o"
        native.finish(native.compile_unit(compiler, unit, target))
        done = subprocess.run(["objdump", "-d", str(target)], capture_output=True, text=True, check=True)
        texts.append(done.stdout)
    return "".join(texts)


@needs_compiler
def test_avx2_objects_hold_no_later_instruction(tmp_path: Path) -> None:
    """Guards: a flag of AVX-512 (or -march=native) for the lowest tier: an illegal instruction on the CPUs it is for,
    which emulation on a better one cannot show."""
    found = _instructions("avx2", tmp_path)
    assert re.search(r"vpmaddwd .*%ymm", found)
    # zmm, mask registers, the upper sixteen ymm and xmm, and what only encodings of AVX-512 name
    assert not re.search(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b|vpdpwssd|vpternlog", found)


@needs_compiler
def test_avx512_objects_hold_no_vnni(tmp_path: Path) -> None:
    """Guards: the same one tier up."""
    found = _instructions("avx512", tmp_path)
    assert re.search(r"vpmaddwd .*%zmm", found)
    assert "vpdp" not in found


def test_each_tier_has_a_library_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: loading what another tier, flag, source or torch was built into."""
    paths = {native.library_path(f"int16-{tier}", int16.units(tier), tmp_path) for tier in TIERS}
    assert len(paths) == 3
    unit = native.Unit(tmp_path / "a.cpp")
    (tmp_path / "a.cpp").write_text("int a;")
    seen = {native.library_path("a", [unit], tmp_path)}
    seen.add(native.library_path("a", [native.Unit(unit.source, ("-mavx2",))], tmp_path))
    (tmp_path / "a.h").write_text("int b;")
    seen.add(native.library_path("a", [unit], tmp_path))
    (tmp_path / "a.cpp").write_text("int c;")
    seen.add(native.library_path("a", [unit], tmp_path))
    monkeypatch.setattr(torch, "__version__", "0.0")
    seen.add(native.library_path("a", [unit], tmp_path))
    assert len(seen) == 5


def test_a_library_of_another_tier_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a cache that was filled under a higher tier, opened under a lower one."""
    asked: list[str] = []
    monkeypatch.setenv("MORPHSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_build", lambda compiler, library, units: library.write_text(""))
    monkeypatch.setattr(native, "find_compiler", lambda openmp=False: "g++")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: asked.append(Path(path).name))
    for has in ((*AVX512, "avx512_vnni"), AVX512, AVX2):
        _capabilities(monkeypatch, *has)
        assert int16.load.__wrapped__() == ""
    assert [name.rpartition("-")[0] for name in asked] == ["int16-vnni", "int16-avx512", "int16-avx2"]
    assert {path.name for path in (tmp_path / "native").glob("*.so")} == set(asked)


def test_without_a_compiler_one_warning_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: a start that dies where g++ is missing, and one that is slow without saying why."""
    monkeypatch.setenv("MORPHSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    _capabilities(monkeypatch, *AVX2)
    with caplog.at_level(logging.WARNING):
        assert "no C++ compiler" in int16.load.__wrapped__()
    (record,) = caplog.records
    assert "no C++ compiler" in record.message and "Install g++, or set CXX" in record.message


@needs_compiler
def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    """Guards: half a library under the name of a whole one, and a message without the compiler's reason."""
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return undeclared; }")
    with pytest.raises(RuntimeError, match="the compiler failed: .*undeclared"):
        native.build("broken", [native.Unit(source, torch=False)], tmp_path / "native")
    assert {path.suffix for path in (tmp_path / "native").iterdir()} == {".lock"}


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"not a library"])
def test_a_damaged_library_is_built_again(tmp_path: Path, damage: bytes) -> None:
    """Guards: a power cut during the first start that leaves every later one without the kernels."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int small() { return 3; }')
    units, directory = [native.Unit(source, torch=False)], tmp_path / "native"
    directory.mkdir()
    library = native.library_path("small", units, directory)
    library.write_bytes(damage)
    native.load("small", units, directory)
    assert ctypes.CDLL(str(library)).small() == 3


def _compiled(directory: Path, result: int) -> Path:
    """Return a library of somebody else's, whose `small` returns `result`."""
    source = directory / f"other{result}.cpp"
    source.write_text(f'extern "C" int small() {{ return {result}; }}')
    return native.build("other", [native.Unit(source, torch=False)], directory / "other")


def _units(directory: Path) -> list[native.Unit]:
    source = directory / "small.cpp"
    source.write_text('extern "C" int small() { return 3; }')
    return [native.Unit(source, torch=False)]


@needs_compiler
@pytest.mark.parametrize("damage", ["foreign", "unsealed", "cut", "changed"])
def test_what_was_not_built_so_is_not_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Guards: a library that somebody put there, or a disk spoilt, run with this user's rights; a cut one, whose pages
    behind the end stop the process by SIGBUS, at each start anew."""
    units, directory = _units(tmp_path), tmp_path / "native"
    library = native.build("small", units, directory)
    whole = library.read_bytes()
    library.unlink()  # another file: a library that is mapped already would be found by its inode
    other = _compiled(tmp_path, 4).read_bytes()
    seal = len(whole) - whole.rindex(b"morphserve sha256 ")
    place = whole.index(b".text")
    found = {"foreign": other[:-seal], "unsealed": whole[:-seal], "cut": whole[: len(whole) // 2],
             "changed": whole[:place] + b"?" + whole[place + 1 :]}[damage]  # fmt: skip
    library.write_bytes(found)
    native.load("small", units, directory)
    assert "built again" in caplog.text and str(library) in caplog.text
    assert library.read_bytes() == whole and ctypes.CDLL(str(library)).small() == 3


@needs_compiler
def test_what_others_could_write_is_closed_to_them_and_built_again(tmp_path: Path) -> None:
    """Guards: running what any user of the machine may have put under a name that can be worked out."""
    units, directory = _units(tmp_path), tmp_path / "native"
    library = native.library_path("small", units, directory)
    directory.mkdir()
    directory.chmod(0o777)
    library.write_bytes(_compiled(tmp_path, 5).read_bytes())  # sealed, as who knows how would
    library.chmod(0o777)
    native.load("small", units, directory)
    assert ctypes.CDLL(str(library)).small() == 3
    assert not (directory.stat().st_mode | library.stat().st_mode) & 0o022


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the same where the directory cannot be closed: its owner can change what was looked at."""
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loaded {path}"))
    directory = tmp_path / "native"
    directory.mkdir()
    if os.geteuid() == 0:  # root's own are everybody's to trust
        os.chown(directory, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(OSError, match="belongs to user .*MORPHSERVE_CACHE"):
        native.load("small", _units(tmp_path), directory)


def test_a_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """Guards: a link in the cache that has a start change the mode of a directory anywhere, which others share."""
    shared, directory = tmp_path / "shared", tmp_path / "native"
    shared.mkdir()
    shared.chmod(0o1777)
    directory.symlink_to(shared)
    with pytest.raises(OSError, match="native is a link.*MORPHSERVE_CACHE"):
        native.build("small", _units(tmp_path), directory)
    assert shared.stat().st_mode & 0o7777 == 0o1777 and not list(shared.iterdir())


@needs_compiler
def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """Guards: a link in the cache that has a start empty, or create, a file anywhere."""
    units, directory = _units(tmp_path), tmp_path / "native"
    directory.mkdir()
    (tmp_path / "mine").write_text("precious")
    native.library_path("small", units, directory).with_suffix(".lock").symlink_to(tmp_path / "mine")
    assert native.build("small", units, directory).exists()
    assert (tmp_path / "mine").read_text() == "precious"


def test_what_never_loads_is_built_once_more_and_no_oftener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a start that compiles for ever where the cache may not hold programs."""
    built: list[Path] = []
    monkeypatch.setattr(native, "find_compiler", lambda openmp=False: "g++")
    monkeypatch.setattr(native, "_build", lambda _, library, units: (built.append(library), library.write_text("")))
    (tmp_path / "small.cpp").write_text("")
    with pytest.raises(OSError, match="Could not load"):
        native.load("small", [native.Unit(tmp_path / "small.cpp")], tmp_path / "native")
    assert len(built) == 2


def test_what_another_process_has_built_again_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: ranks that start together on a damaged library, and delete what the first of them has built again."""
    library, sound, tries = tmp_path / "small.so", tmp_path / "sound", 0

    def load(path: Path) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            os.replace(sound, library)
            raise OSError("invalid ELF header")

    library.write_text("damaged")
    sound.write_text("sound")
    monkeypatch.setattr(native, "build", lambda *_: library)
    monkeypatch.setattr(torch.ops, "load_library", load)
    native.load("small", [], tmp_path)
    assert tries == 2 and library.read_text() == "sound"


def test_a_compiler_that_takes_too_long_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: cc1plus, which does the work, outliving the g++ that started it."""
    pid, slow = tmp_path / "pid", tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\nsleep 600 2>/dev/null &\necho $! > {pid}.part\nmv {pid}.part {pid}\nwait\n")
    slow.chmod(0o755)
    process = native.compile_unit(str(slow), native.Unit(tmp_path / "a.cpp", torch=False), tmp_path / "a.o")
    while not pid.exists():
        assert process.poll() is None
    child = os.pidfd_open(int(pid.read_text()))
    monkeypatch.setattr(native, "_BUILD_TIMEOUT_S", 0)
    with pytest.raises(RuntimeError, match="took more than"):
        native.finish(process)
    ended, _, _ = select.select([child], [], [], 30)
    os.close(child)
    assert ended


@needs_compiler
def test_builds_at_once_make_one_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: ranks that start together and overwrite, or compile, what another one is loading."""
    source, built = tmp_path / "small.cpp", []
    source.write_text('extern "C" int small() { return 3; }')
    original = native._build
    monkeypatch.setattr(native, "_build", lambda *arguments: (built.append(1), original(*arguments))[1])
    units, paths = [native.Unit(source, torch=False)], []
    threads = [
        threading.Thread(target=lambda: paths.append(native.build("small", units, tmp_path / "native")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(set(paths)) == 1 and paths[0].exists() and len(built) == 1


@needs_compiler
def test_the_process_keeps_one_openmp_runtime() -> None:
    """Guards: operators linked to another OpenMP than torch's: two sets of threads that fight for the cores."""
    if why := int16.load():
        pytest.skip(why)
    script = (
        "import re; from quant_layers.kernels import int16; assert not int16.load()\n"
        "print(sorted(set(re.findall(r'\\S*/lib(?:gomp|omp|iomp)\\S*', open('/proc/self/maps').read()))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1 and "omp" in done.stdout, done.stdout


def test_clang_is_refused_where_openmp_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a second OpenMP runtime in the process, whose threads fight torch's for the cores."""
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho Debian clang version 14.0.6\n")
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    assert native.find_compiler() == str(clang)
    with pytest.raises(RuntimeError, match="install g\\+\\+, or set CXX"):
        native.find_compiler(openmp=True)


@needs_compiler
def test_what_was_built_is_closed_to_others_under_any_umask(tmp_path: Path) -> None:
    """Guards: a container whose umask is 0, where each start finds its own library open to others, and compiles."""
    units, directory = _units(tmp_path), tmp_path / "native"
    before = os.umask(0)
    try:
        library = native.build("small", units, directory)
    finally:
        os.umask(before)
    assert not library.stat().st_mode & 0o022
    built = library.stat()
    assert os.path.samestat(native.build("small", units, directory).stat(), built)
