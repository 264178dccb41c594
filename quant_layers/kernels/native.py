"""Builds C++ operators at their first use, and keeps them in the user's cache: one file a source, torch and CPU tier.

Loading a library runs it. So it ends with the hash of what the linker wrote, and one that is damaged, or that others
could have written, is built again; a cut one would not raise but end the process.

torch.compile needs a C++ compiler on CPU too, so where speed matters one is usually there. Callers serve without what
could not be built: slower, never wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quant_layers.private import locked, only_ours, private_directory

logger = logging.getLogger("vllm.morphserve")

_BUILD_TIMEOUT_S = 300
_SEAL = b"morphserve sha256 "  # then the hash: what follows an ELF file's sections is nobody else's
_COMMON = ("-O2", "-std=c++20", "-fPIC")


@dataclass(frozen=True, slots=True)
class Unit:
    """A source file, and the flags that it alone is compiled with."""

    source: Path
    flags: tuple[str, ...] = ()
    torch: bool = True  # whether it includes torch's headers


def default_directory() -> Path:
    """Return where built operators are kept: `$MORPHSERVE_CACHE/native`, by default `~/.cache/morphserve/native`."""
    return Path(os.environ.get("MORPHSERVE_CACHE") or "~/.cache/morphserve").expanduser().absolute() / "native"


def library_path(name: str, units: Sequence[Unit], directory: Path) -> Path:
    """Return where the library of these units belongs: another source, header, flag or torch is another file."""
    seen = hashlib.sha256(f"sealed, torch {torch.__version__}".encode())
    for unit in units:
        seen.update(repr((unit.source.name, unit.flags)).encode())
        for file in (unit.source, *sorted(unit.source.parent.glob("*.h"))):
            seen.update(file.read_bytes())
    return directory / f"{name}-{seen.hexdigest()[:16]}.so"


def build(name: str, units: Sequence[Unit], directory: Path | None = None) -> Path:
    """Return the path of the library of these units, compiled if it is not there yet.

    Processes that build the same at once wait for the first; one that cannot wait builds into a file of its own, and
    the last rename wins.

    Raises:
        FileNotFoundError: no compiler.
        RuntimeError: the compiler failed; the message has its last words.
        OSError: `directory` cannot be written, or others can write it.
    """
    library = library_path(name, units, directory or default_directory())
    _take_directory(library.parent)
    if _is_sound(library):
        return library
    compiler = find_compiler(openmp=any("-fopenmp" in unit.flags for unit in units))
    with _only_one(library.with_suffix(".lock")):
        if not _is_sound(library):
            if library.exists():
                logger.warning("morphserve: %s is damaged, or others could write it: it is built again", library)
            logger.info("morphserve: compiling %s, once (20 seconds or so)", library.name)
            _build(compiler, library, units)
            logger.info("morphserve: built %s", library)
    return library


def load(name: str, units: Sequence[Unit], directory: Path | None = None) -> None:
    """Build the library of these units if it is not there yet, and load it; one that is damaged is built once more.

    Raises:
        FileNotFoundError: no compiler.
        RuntimeError: the compiler failed.
        OSError: `directory` cannot be written, or what was built cannot be loaded.
    """
    library = build(name, units, directory)
    tried = library.stat()
    try:
        torch.ops.load_library(library)
    except OSError as e:
        logger.warning("morphserve: %s cannot be loaded (%s), and is built again", library, e)
        with _only_one(library.with_suffix(".lock")):
            if library.exists() and os.path.samestat(library.stat(), tried):  # or another process did it already
                library.unlink()
        torch.ops.load_library(build(name, units, directory))


def find_compiler(openmp: bool = False) -> str:
    """Find the C++ compiler to use.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: it is clang, and `openmp` is wanted: that would bring a second OpenMP runtime into the process,
            whose threads compete with torch's.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: install g++, or set CXX to one")
    if openmp:
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False).stdout
        if "clang" in version:
            raise RuntimeError(f"{compiler} is clang, with an OpenMP of its own: install g++, or set CXX to it")
    return compiler


def compile_unit(compiler: str, unit: Unit, target: Path) -> subprocess.Popen[str]:
    """Start to compile one unit to an object file."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-isystem{path}" for path in include_paths()] if unit.torch else []
    command = [*compiler.split(), *_COMMON, *unit.flags, "-c", str(unit.source), "-o", str(target), *includes]
    return _start(command)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a compiler.

    Raises:
        RuntimeError: it failed, or took longer than five minutes.
    """
    try:
        _, words = process.communicate(timeout=_BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the compiler took more than {_BUILD_TIMEOUT_S} s") from None
    finally:
        _end(process)
    if process.returncode != 0:
        errors = [line for line in words.splitlines() if "error" in line] or words.strip().splitlines()[-1:]
        raise RuntimeError(f"the compiler failed: {' '.join(errors[:1])}")


def _build(compiler: str, library: Path, units: Sequence[Unit]) -> None:
    from torch.utils.cpp_extension import library_paths

    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        objects = [Path(scratch) / f"{index}.o" for index in range(len(units))]
        running = [compile_unit(compiler, unit, target) for unit, target in zip(units, objects, strict=True)]
        try:
            for process in running:
                finish(process)
        finally:
            for process in running:
                _end(process)
        openmp = {"-fopenmp"} & {flag for unit in units for flag in unit.flags}
        built = Path(scratch) / library.name
        command = [
            *compiler.split(), "-shared", *map(str, objects), "-o", str(built), *openmp,
            *(f"-L{path}" for path in library_paths()),
            "-lc10", "-ltorch_cpu", "-ltorch",
        ]  # fmt: skip
        finish(_start(command))
        _seal(built)
        os.replace(built, library)


def _take_directory(directory: Path) -> None:
    """Create the directory of libraries, or close it to others.

    Raises:
        OSError: it is another user's, or a link, or cannot be created.
    """
    private_directory(directory)
    if only_ours(directory):
        return
    remedy = "a library that is loaded runs. Set MORPHSERVE_CACHE, and cache_dir, to a directory of your own"
    if directory.is_symlink():
        raise PermissionError(f"{directory} is a link, and {remedy}")
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise PermissionError(
                f"{directory} belongs to user {found.st_uid} or is open to others, this is user {os.geteuid()}, "
                f"and {remedy}"
            )
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    finally:
        os.close(descriptor)


def _seal(library: Path) -> None:
    """Write the hash of a new library to its end, and see to it that a machine which goes down leaves all of it."""
    library.chmod(0o755)
    with library.open("r+b") as file:
        mark = _SEAL + hashlib.sha256(file.read()).digest()
        file.write(mark)
        file.flush()
        os.fsync(file.fileno())


def _is_sound(library: Path) -> bool:
    """Return whether a library is there as it was built, by this user or root."""
    try:
        if not only_ours(library):
            return False
        content = library.read_bytes()
    except OSError:
        return False
    end = len(content) - len(_SEAL) - hashlib.sha256().digest_size
    return end > 0 and content[end:] == _SEAL + hashlib.sha256(content[:end]).digest()


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a compiler as the head of a session: it only drives those that do the work."""
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )


def _end(process: subprocess.Popen[str]) -> None:
    """End a compiler that still runs, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock between processes, where the file system has them."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(locked(path))
        yield
