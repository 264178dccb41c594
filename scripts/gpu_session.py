"""Does MorphServe run on a GPU machine that is there for minutes, bare and without a network?

Unpacks a vLLM, writes the plugin's dist-info, checks imports, operators and entry points, then runs lanes of
`morphserve gpu-check` beside each other: a lane's parts one after the other. What is to be timed wants a single lane.
Then the commands of `morphserve` that --run gives, one after the other, each with what is left of --minutes.
Standard library only, until the lanes start. Each lane writes into a directory of its own in --out, as it goes.

    python3 scripts/gpu_session.py --vllm vllm.tar.xz --minutes 4 --lane t1,t4,t6 --lane t9,t10
    python3 scripts/gpu_session.py --vllm vllm.tar.xz --minutes 6 --lane t2,t3,t5,t11
    python3 scripts/gpu_session.py --vllm vllm.tar.xz --minutes 8 --run "replay --workload w.jsonl --model DIR ..."

Output: one line for each thing found at start; then each lane's parts with status, seconds and what was missed, and
every figure; then what the commands print. Exit status: 0 all parts and commands ok, 1 else. Last stdout line: one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # nothing is installed on such a machine
from morphserve.tools.children import with_us  # noqa: E402

_GRACE_S = 60.0  # two servers, 20 s each until they are killed
_PRESENT = """
import importlib.metadata as m, sys, time
start = time.perf_counter()
import torch
print("torch", torch.__version__, torch.version.cuda, torch.cuda.get_device_name(0), torch.cuda.mem_get_info())
import triton, cuda.bindings
print("triton", triton.__version__, "cuda-bindings", cuda.bindings.__version__)
import morphserve
print("entry points", [e.value for e in m.entry_points(group="vllm.general_plugins")])
if sys.argv[1] == "vllm":
    import vllm, vllm._custom_ops, vllm.platforms
    print("vllm", vllm.__version__, vllm.platforms.current_platform.device_name)
    for name in ("marlin_gemm", "machete_mm", "cutlass_scaled_mm", "gptq_marlin_repack"):
        print("operator", name, hasattr(torch.ops._C, name))
    import vllm.vllm_flash_attn
    import vllm.model_executor.warmup.kernel_warmup
print(f"{time.perf_counter() - start:.1f} s of imports")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="archive with vllm/ and what it needs beside torch")
    parser.add_argument(
        "--lane", action="append", default=[], metavar="PARTS", help="of gpu-check; may be repeated"
    )
    parser.add_argument(
        "--run", action="append", default=[], metavar="WORDS", help="a command of morphserve; may be repeated"
    )
    parser.add_argument("--minutes", type=float, required=True, help="for all of it")
    parser.add_argument("--site", type=Path, default=Path("/tmp/gpu_session"), help="where to unpack, once")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "reports/gpu_session"))
    args = parser.parse_args()
    if not args.lane and not args.run:
        parser.error("nothing to do: give --lane or --run")
    start = time.monotonic()
    env = environment(args.site, args.vllm)
    print(f"unpacked after {time.monotonic() - start:.1f} s", flush=True)
    # Beside the lanes: what it finds missing ends them too, and it takes as long as a short part.
    tell = [sys.executable, "-c", _PRESENT, "vllm" if args.vllm else "no"]
    told = subprocess.Popen(tell, env=env, preexec_fn=with_us())
    lanes = {}
    for number, parts in enumerate(args.lane, 1):
        out = args.out / f"lane{number}"
        command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--only", parts, "--out", str(out)]
        lanes[out] = subprocess.Popen(
            [*command, "--minutes", f"{args.minutes:g}"],
            env=env, stdout=subprocess.DEVNULL, stderr=sys.stderr, preexec_fn=with_us(),
        )  # fmt: skip
    codes = [lane.wait() for lane in lanes.values()]
    print(f"imports: exit status {told.wait()}; lanes: {codes}, after {time.monotonic() - start:.1f} s", flush=True)
    for file in (out / "gpu_check.json" for out in lanes):
        if file.is_file():  # else its lane has died before its first part, and said why
            print_lane(json.loads(file.read_text()))
    runs = [run(words, env, start + 60 * args.minutes - time.monotonic()) for words in args.run]
    took_s = round(time.monotonic() - start, 1)
    print(json.dumps({"lanes": dict(zip(args.lane, codes, strict=True)), "runs": runs, "s": took_s}))
    return 0 if not any(codes + runs) else 1


def run(words: str, env: dict[str, str], left_s: float) -> int:
    """Run a command of morphserve and return its exit status; asked to end when its time is out.

    One that goes on for `_GRACE_S` all the same is killed, and one that has no time is not begun: 1.
    """
    print(f"\n$ morphserve {words}", flush=True)
    if left_s <= 0:
        print("no time is left for it", flush=True)
        return 1
    command = [sys.executable, "-m", "morphserve", *shlex.split(words)]
    process = subprocess.Popen(command, env=env, preexec_fn=with_us())
    begin = time.monotonic()
    try:
        code = process.wait(left_s)
    except subprocess.TimeoutExpired:
        print(f"out of time after {left_s:.0f} s", flush=True)
        process.terminate()  # it ends its servers then; what was started in the background may not hear SIGINT
        try:
            code = process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    print(f"exit status {code}, {time.monotonic() - begin:.1f} s", flush=True)
    return code


def environment(site: Path, archive: Path | None) -> dict[str, str]:
    """Unpack what is not there yet, and return the environment of a process that finds all of it."""
    packages, dist = site / "packages", site / "dist"
    if archive is not None and not packages.is_dir():
        partial = site / "partial"
        with tarfile.open(archive) as opened:
            opened.extractall(partial, filter="tar")
        partial.rename(packages)  # so that what was broken off is unpacked anew
    write_distribution(dist)
    path = [str(place) for place in (packages, dist, ROOT)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(site / "cache"),
        "TRITON_CACHE_DIR": str(site / "cache" / "triton"),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # vLLM 0.33 takes it for granted, and the archive need not have it
        "MORPHSERVE_UNPROVEN_CUDA": "1",
    }


def write_distribution(directory: Path) -> None:
    """Write what an installed plugin leaves for vLLM to find: names and entry points, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = directory / f"{project['name']}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    groups = project["entry-points"].items()
    lines = (f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in entries.items()) for group, entries in groups)
    (info / "entry_points.txt").write_text("\n".join(lines))


def print_lane(document: dict[str, Any]) -> None:
    """Print every part's figures, then what it missed."""
    for part in document["parts"]:
        found = part["findings"]
        print(f"\n{part['part']} {part['status']} {part['seconds']:g} s {part['reason']}")
        for note in found["notes"]:
            print(f"  note: {note}")
        for f in found["figures"]:
            spread = f"[{f['q1']:g} {f['q3']:g}] p99 {f['p99']:g} most {f['most']:g} n {f['repeats']}"
            print(f"  {f['name']}: {f['median']:g} {f['unit']} {spread if f['repeats'] > 1 else ''}")
        for verdict in found["verdicts"]:
            if not verdict["ok"]:
                print(f"  {'MISSED' if verdict['required'] else 'missed'}: {verdict['name']}: {verdict['detail']}")
        if part["output_tail"]:
            print(part["output_tail"][-1500:])


if __name__ == "__main__":
    raise SystemExit(main())
