"""Is there a Prometheus to check rules, queries and a board with? Brings Debian's if not, and installs nothing.

The package is downloaded by apt, without root, and its two programs are put into the cache directory
(~/.cache/morphserve/prometheus, or in MORPHSERVE_CACHE): 19 MB to download, 96 MB there. Where there is no apt, or
nothing to be had, it says so and ends with 1; tests that need promtool then skip. Standard library only.

Last stdout line: one JSON document {"prometheus": path, "promtool": path}.

    python3 scripts/fetch_prometheus.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # without an installed package, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from morphserve.cache import cache_root

NAMES = ("prometheus", "promtool")
_PACKAGE = "prometheus"
_TIMEOUT_S = 120


class NoPrometheus(Exception):
    """The sentence says why there is none."""


def find_tool(name: str) -> str | None:
    """Return a program's path: on PATH, or as fetched before."""
    fetched = cache_root() / "prometheus" / name
    return shutil.which(name) or (str(fetched) if os.access(fetched, os.X_OK) else None)


def fetch() -> None:
    """Put both programs into the cache directory.

    Raises:
        NoPrometheus: there is no apt, or it has no such package.
    """
    if missing := [each for each in ("apt-get", "dpkg-deb") if shutil.which(each) is None]:
        raise NoPrometheus(f"no {missing[0]} here; put Prometheus 2.42 or later on PATH")
    target = cache_root() / "prometheus"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        where = Path(directory)
        _download(where)
        unpacked = where / "unpacked"
        _run(["dpkg-deb", "--extract", str(next(where.glob("*.deb"))), str(unpacked)], where)
        programs = where / "programs"
        programs.mkdir()
        for name in NAMES:
            (unpacked / "usr" / "bin" / name).replace(programs / name)
        shutil.rmtree(target, ignore_errors=True)
        programs.replace(target)


def _download(where: Path) -> None:
    """Download the package; where apt knows of none as yet, let it look into lists of our own first."""
    (where / "lists" / "partial").mkdir(parents=True)
    ours = ["-o", f"Dir::State::Lists={where}/lists", "-o", f"Dir::Cache={where}", "-o", "APT::Sandbox::User="]
    try:
        _run(["apt-get", "download", _PACKAGE], where)
    except NoPrometheus:
        _run(["apt-get", *ours, "update"], where)
        _run(["apt-get", *ours, "download", _PACKAGE], where)


def _run(command: list[str], where: Path) -> None:
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as e:
        raise NoPrometheus(f"{' '.join(command[:2])} took longer than {_TIMEOUT_S} s") from e
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise NoPrometheus(f"{' '.join(command[:2])}: {said[-1]}")


def main() -> int:
    if None in map(find_tool, NAMES):
        try:
            fetch()
        except (NoPrometheus, OSError) as e:
            sys.stderr.write(f"fetch_prometheus.py: no promtool: {e}\n")
            return 1
    sys.stdout.write(json.dumps({name: find_tool(name) for name in NAMES}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
