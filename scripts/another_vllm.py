"""Another vLLM than the one that is pinned, on a CPU for which it has no wheel: an environment beside the first.

A vLLM comes out for CUDA weeks before it does for CPU. Its Python is the same for both, and runs on the kernels of the
CPU wheel before it: this takes the one from its wheel and links the other. All else is the first environment's, which
is on the path behind this one. Standard library only; bootstrap.py calls it for VLLM=0.33.0.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from morphserve.setup import GIB, SetupError, check_disk, explain_pip_failure, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bootstrap import Environment

    from morphserve.setup import Runner

# Of what its wheel asks for beyond the CPU wheel before it, the packages that serving text on a CPU imports. The others
# are CUDA's, or newer releases of what is there: one that turns out to be needed fails the last check, by its name.
NEEDED = ("orjson",)
NEEDED_BYTES = GIB  # the wheel has 0.3 GiB, and is deleted; 0.1 GiB stay
# In the wheel, and of no use without a GPU: libraries and the sources of kernels.
_LEFT_OUT = frozenset({".so", ".h", ".hpp", ".cuh", ".cu", ".inl", ".jpg"})
_LEFT_OUT_FILES = frozenset({"vllm/vllm-rs"})
# How a command of Python begins, or where the path is too long or has blanks; and how ours do, whatever the path.
_BEGINS = re.compile(rb"\A#!(?:/[^\n]*/python[\d.]*\n|/bin/sh\n'''exec' [^\n]*python[^\n]*\n' '''\n)")
_BEGIN = "#!/bin/sh\n'''exec' \"{}\" \"$0\" \"$@\"\n' '''\n"
_PATH_FILE = "morphserve-first-venv.pth"
_PROBE = (
    "import importlib.metadata as m, vllm; from vllm.platforms import current_platform as p; p.import_kernels(); "
    "import vllm.entrypoints.openai.api_server; assert p.is_cpu(), p; assert m.version('vllm').startswith("
    "vllm.__version__), vllm.__file__; print(m.version('vllm'))"
)


def wanted_version(asked: str, pinned: str) -> str | None:
    """Return the version that needs an environment of its own; None for the one that the first environment has.

    Args:
        asked: what VLLM is set to.
        pinned: what the first environment has, as "0.32.0+cpu".

    Raises:
        SetupError: it is no version.
    """
    if not asked or asked == pinned.partition("+")[0]:
        return None
    if not re.fullmatch(r"\d+(\.\d+)+((rc|\.post)\d+)?", asked):
        raise SetupError(f"VLLM is {asked!r}, must be a version of vLLM as the package index has it, like 0.33.0.")
    return asked


class AnotherVllm:
    """One version's environment, and how it comes about. Each step finds what an interrupted one has left."""

    def __init__(self, first: Environment, own: Environment, version: str, install: Runner) -> None:
        self.first, self.own, self.version, self.install = first, own, version, install
        self.downloads = own.venv / "download"

    def set_up(self, root: Path) -> dict[str, object]:
        """Bring the environment to where `version` runs in it.

        Args:
            root: the project.

        Raises:
            SetupError: the machine lacks something; the message says what.
        """
        result: dict[str, object] = {"python": str(self.own.python), "extra": "cpu", "vllm": f"{self.version}+cpu"}
        if self.first.build != "cpu":
            raise SetupError(
                f"VLLM={self.version} builds on the CPU wheel of vLLM, and {self.first.venv} holds the CUDA build. "
                f"Install the version there: {self.first.python} -m pip install vllm=={self.version}"
            )
        stamp = self._stamp(root)
        if self.own.python.exists() and self.own.stamp == stamp:
            return {**result, "changed": False}
        check_disk(self.own.venv, NEEDED_BYTES, f"vLLM {self.version}", "Free some space, then run again.")
        say(f"vLLM {self.version} goes into {self.own.venv}: 0.4 GB to download, 0.1 GiB on disk when done; kernels "
            f"and packages are those of {self.first.venv}")  # fmt: skip
        self._make_environment()
        self.own.forget_half_installed()
        self._take_python()
        self._link_kernels()
        self._take_packages()
        self._take_commands()
        self._verify()
        self.own.stamp = stamp
        return {**result, "changed": True}

    @property
    def site(self) -> Path:
        """Where its packages lie."""
        site = self.own.site_packages
        assert site is not None
        return site

    @property
    def info(self) -> Path:
        """Its metadata, written when its Python is there."""
        return self.site / f"vllm-{self.version}+cpu.dist-info"

    def _stamp(self, root: Path) -> str:
        here = Path(__file__).read_bytes() + f"{self.version} {self.first.venv}".encode()
        return hashlib.sha256(self.first.fingerprint(root).encode() + here).hexdigest()

    def _make_environment(self) -> None:
        first = self.first.site_packages
        assert first is not None
        ours = self.own.site_packages
        if ours is None or ours.parent.name != first.parent.name or not self.own.python.exists():
            command = [str(self.first.python), "-m", "venv", "--clear", "--without-pip", str(self.own.venv)]
            if (done := self.first.run(command))[0] != 0:
                raise SetupError(f"{' '.join(command)} failed: {done[1].strip()}")
        # `addsitedir`, unlike a line with a path, heeds the .pth files there: the project itself is one of them.
        (self.site / _PATH_FILE).write_text(f"import site; site.addsitedir({str(first)!r})\n", encoding="utf-8")

    def _take_python(self) -> None:
        if self.info.is_dir() and (self.site / "vllm").is_dir():
            return
        self.downloads.mkdir(exist_ok=True)
        command = [str(self.own.python), "-m", "pip", "download", "--no-input", "--progress-bar", "off"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(self.downloads), f"vllm=={self.version}"]
        self._pip(command, f"downloading vLLM {self.version}")
        try:
            with zipfile.ZipFile(next(self.downloads.glob("vllm-*.whl"))) as wheel:
                with _staged(self.site / "vllm") as staged:
                    say(f"unpacking its Python: {unpack(wheel, staged)} files")
                with _staged(self.info) as staged:
                    write_metadata(wheel, staged, f"{self.version}+cpu")
        except (zipfile.BadZipFile, StopIteration) as e:
            shutil.rmtree(self.downloads)
            raise SetupError(f"the wheel of vLLM {self.version} cannot be read ({e}): run again.") from e
        shutil.rmtree(self.downloads)

    def _link_kernels(self) -> None:
        first = self.first.site_packages
        assert first is not None
        kernels = sorted((first / "vllm").glob("*.so"))
        if not kernels:
            raise SetupError(f"{first / 'vllm'} holds no compiled kernels; delete {self.first.venv} and run again.")
        for kernel in kernels:
            link = self.site / "vllm" / kernel.name
            link.unlink(missing_ok=True)
            try:
                os.link(kernel, link)
            except OSError:  # another file system
                link.symlink_to(kernel)

    def _take_packages(self) -> None:
        asked = [line for line in (self.info / "requirements.txt").read_text(encoding="utf-8").splitlines() if line]
        names = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower(): line for line in asked}
        wanted = [names[name] for name in NEEDED if name in names]
        if wanted:
            command = [str(self.own.python), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *wanted]
            self._pip(command, f"installing what vLLM {self.version} needs besides")

    def _pip(self, command: list[str], what: str) -> None:
        code, output = self.install(command)
        self.own.log.write_text(output, encoding="utf-8")
        if code != 0:
            raise SetupError(explain_pip_failure(output, what, self.own.log))

    def _take_commands(self) -> None:
        """Give this environment the first one's commands, to be run by its own Python."""
        for command in sorted((self.first.venv / "bin").iterdir()):
            own = self.own.venv / "bin" / command.name
            if not command.is_file() or command.is_symlink() or command.name.lower().startswith(("activate", "python")):
                continue
            own.unlink(missing_ok=True)
            content = command.read_bytes()
            begin = _BEGINS.match(content)
            if begin is None:  # no Python
                own.symlink_to(command)
                continue
            own.write_bytes(_BEGIN.format(self.own.python).encode() + content[begin.end() :])
            own.chmod(0o755)

    def _verify(self) -> None:
        code, output = self.own.run([str(self.own.python), "-c", _PROBE])
        if code != 0:
            raise SetupError(
                f"vLLM {self.version} does not run on the kernels of {self.first.venv}:\n{output.strip()[-2000:]}\n"
                f"A package that is not found belongs into NEEDED of scripts/another_vllm.py; vLLM {self.version} asks "
                f"for those in {self.info / 'requirements.txt'}."
            )


def unpack(wheel: zipfile.ZipFile, target: Path) -> int:
    """Extract what a CPU can use of a vLLM wheel; how many files that are.

    Args:
        wheel: for CUDA.
        target: becomes the package's directory.
    """
    files = [
        name for name in wheel.namelist()
        if name.startswith("vllm/") and not name.endswith("/") and name not in _LEFT_OUT_FILES
        if PurePosixPath(name).suffix not in _LEFT_OUT
    ]  # fmt: skip
    for name in files:
        to = target / PurePosixPath(name).relative_to("vllm")
        to.parent.mkdir(parents=True, exist_ok=True)
        with wheel.open(name) as source, to.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return len(files)


def write_metadata(wheel: zipfile.ZipFile, target: Path, version: str) -> None:
    """Write the metadata of a distribution `vllm` that needs nothing, and aside what its wheel asks for.

    vLLM's own plugins, for LoRA, are found already: by the metadata of the CPU wheel.

    Args:
        wheel: for CUDA.
        target: the directory.
        version: with "cpu" in it, by which vLLM tells its platform.
    """
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    asked = HeaderParser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist") or []
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: vLLM's Python on the kernels of an earlier CPU wheel\n",
        "INSTALLER": "morphserve-bootstrap\n",
        "requirements.txt": "\n".join(asked) + "\n",
    }
    folder = f"vllm-{version}.dist-info"
    texts["RECORD"] = "".join(f"{folder}/{name},,\n" for name in (*texts, "RECORD"))
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Give a directory beside `target` that becomes it at the end, at once or not at all."""
    for left in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(left)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    staged.chmod(0o755)
    yield staged
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
