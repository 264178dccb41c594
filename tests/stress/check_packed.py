"""Does MorphServe fit a CUDA build of vLLM, as far as a machine without a GPU can tell? Imports, configs, wraps.

For a vLLM whose CUDA libraries cannot run here. The stub (tests/stub_driver) is a faked H200 that computes nothing,
so nothing is said of kernels, speed or results. Columns: section, check, ok or NO, what was found. Exit status 1 if a
check does not hold. Last stdout line: one JSON document.

    python tests/stress/check_packed.py --site DIRECTORY --python PYTHON

--site: a directory with vllm/ and what it needs beside torch. --python: of an environment with torch for CUDA 13,
cuda-bindings, transformers. Nothing is installed there. Takes about two minutes, and two more for each engine.
--engines: a small engine in each of six ways, through its levels and back under load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from morphserve.tools.gpucheck.engines import MODELS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stub driver lies
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from gpu_session import write_distribution
from stub_driver import StubError, build, environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECTIONS = ("libraries", "seams", "config", "plugin", "refusals", "wraps")
SERVE = "serve"
ENGINES = tuple(f"engine_{runner}_{how}" for runner in ("v2", "v1") for how in ("eager", "full", "compiled"))
_LIMIT_S = 600
_ENGINE_MIB = 2048  # of the fake device; what is written to it is this machine's memory
_SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One check of one section."""

    section: str
    row: str
    ok: bool
    detail: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, required=True, metavar="DIR", help="directory that holds vllm/")
    parser.add_argument("--python", default=sys.executable, metavar="PY", help="interpreter with torch for CUDA")
    every = (*SECTIONS, *ENGINES, SERVE)
    parser.add_argument("--only", choices=every, action="append", help="a section; may be repeated")
    parser.add_argument("--engines", action="store_true", help="engines as well, in all ways")
    parser.add_argument("--verbose", action="store_true", help="what the sections print on stderr, too")
    args = parser.parse_args(argv)
    if not (args.site / "vllm").is_dir():
        parser.error(f"--site {args.site}: no vllm/ in it")
    with tempfile.TemporaryDirectory(prefix="stub_driver_") as directory:
        work = Path(directory)
        try:
            build(nvidia_of(args.python), work / "stubs")
        except StubError as e:
            parser.error(str(e))
        env = child_environment(args.site, work, dict(os.environ))
        rows: list[Row] = []
        for section in args.only or (*SECTIONS, *((*ENGINES, SERVE) if args.engines else ())):
            rows += run_section(section, args.python, work, env, args.verbose)
    for r in rows:
        print(f"{r.section:<18} {r.row:<44} {'ok' if r.ok else 'NO':<3} {r.detail}")
    print(json.dumps({"site": str(args.site), "ok": all(r.ok for r in rows), "rows": [asdict(r) for r in rows]}))
    return 0 if all(r.ok for r in rows) else 1


def nvidia_of(python: str) -> Path:
    """`nvidia/cu13` of an interpreter's packages.

    Raises:
        StubError: it has none.
    """
    asked = "import importlib.util as u; s = u.find_spec('nvidia'); print(*(s.submodule_search_locations if s else ()))"
    try:
        told = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False).stdout.split()
    except OSError as e:
        raise StubError(f"--python {python}: {e}") from e
    found = [Path(place) / "cu13" for place in told if (Path(place) / "cu13").is_dir()]
    if not found:
        raise StubError(f"--python {python}: no package nvidia/cu13. Give an interpreter with torch for CUDA 13.")
    return found[0]


def child_environment(site: Path, work: Path, base: dict[str, str]) -> dict[str, str]:
    """Of a section: stubs first, the vLLM, this repository, the plugin's entry point; no network."""
    write_distribution(work / "dist")
    told = "[vllm.general_plugins]\npacked_serve = packed_serve:register\n"  # does nothing but in the serve section
    stand_in = work / "dist" / "packed_serve-0.dist-info"
    stand_in.mkdir()
    (stand_in / "METADATA").write_text("Metadata-Version: 2.1\nName: packed_serve\nVersion: 0\n")
    (stand_in / "entry_points.txt").write_text(told)
    for name, changes in (("model", dict[str, int]()), ("small", _SMALL)):
        (work / name).mkdir(exist_ok=True)
        (work / name / "config.json").write_text(json.dumps({**MODELS["8B shape"], **changes}))
    kept = {k: v for k, v in base.items() if not k.startswith(("VLLM_", "MORPHSERVE_", "PYTHON"))}
    path = [str(site.resolve()), str(ROOT), str(work / "dist"), str(HERE)]
    return {
        **environment(work / "stubs", kept),
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(work / "cache"),
        "TRITON_CACHE_DIR": str(work / "cache" / "triton"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def run_section(section: str, python: str, work: Path, env: dict[str, str], verbose: bool) -> list[Row]:
    """Rows of one section; what it could not tell, because it ended early, is a row that does not hold."""
    is_engine = section in (*ENGINES, SERVE)
    file = "packed_serve.py" if section == SERVE else "packed_engine.py" if is_engine else "packed_rows.py"
    command = [python, str(HERE / file), section]
    where = work / ("small" if is_engine else "model")
    if is_engine:
        env = {**env, "FAKE_GPU_MIB": str(_ENGINE_MIB)}
    try:
        done = subprocess.run(
            command, cwd=where, env=env, capture_output=True, text=True, check=False, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return [Row(section, "end", False, f"no end in {_LIMIT_S} s")]
    if verbose:
        print(done.stderr, file=sys.stderr)
    return rows_of(section, done.stdout, done.returncode, done.stderr)


def rows_of(section: str, stdout: str, status: int, stderr: str) -> list[Row]:
    """What a section has printed."""
    rows = []
    for line in stdout.splitlines():
        told = json.loads(line)
        rows.append(Row(section, told["row"], told["ok"], told["detail"]))
    if status != 0 or not rows:
        last = (stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        rows.append(Row(section, "end", False, f"exit status {status} after {len(rows)} rows: {last[:300]}"))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
