"""What do our Triton kernel's launches take of a GPU? Compiles them for GPUs that are not here, with Triton's ptxas.

Sizes come from the launcher itself, which is called on tensors without memory. Each choice of block sizes is compiled
once for each group size and architecture, and what else Triton specializes on (dtype, bias, divisibility) takes turns.

    python tests/triton_ahead.py                # 9 launches for each of three architectures, half a minute
    python tests/triton_ahead.py --all          # every specialization of every launch, minutes
    python tests/triton_ahead.py --arch 86,89

Output columns: architecture, launch, shared memory a block in bytes, registers a thread, bytes spilled to memory and
read back, size of the cubin, whether the matrix units are used. Last stdout line: one JSON document; {"missing": why}
without ptxas. A process of its own: Triton asks for its interpreter once, when it is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from quant_layers.formats.canonical import IMPORTED_GROUP_SIZES
from quant_layers.kernels import triton_w4a16

ROWS = (*range(1, 130), *(2**power + more for power in range(8, 17) for more in (-1, 0, 1)))
LINEARS = ((6144, 4096), (4096, 14336), (960, 576), (1000, 256))  # [N, K]; the last N is no multiple of 16
KERNEL = triton_w4a16._w4a16_kernel
Launch = tuple[tuple[Any, ...], dict[str, Any]]


class Target:
    """A driver that names the GPU to compile for, and is asked for nothing else."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)  # Triton keeps what it knows of a target by this number

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Stands where the kernel does, and keeps what it would have been launched with."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **sizes: self.launches.append((args, sizes))


def launches() -> dict[str, dict[str, Launch]]:
    """Launches by what is chosen for them, and among those by what Triton specializes on besides."""
    recorder = triton_w4a16._w4a16_kernel = Recorder()
    with torch.device("meta"):
        for dtype, group, has_bias in itertools.product(
            (torch.bfloat16, torch.float16), IMPORTED_GROUP_SIZES, (True, False)
        ):
            for (n, k), m in itertools.product(LINEARS, ROWS):
                if k % group == 0:
                    triton_w4a16.w4a16_matmul(
                        torch.empty(m, k, dtype=dtype),
                        torch.empty(k // 8, n, dtype=torch.int32),
                        torch.empty(k // group, n, dtype=dtype),
                        torch.empty(k // group, n, dtype=torch.uint8),
                        torch.empty(n, dtype=dtype) if has_bias else None,
                    )
    found: dict[str, dict[str, Launch]] = {}
    for args, sizes in recorder.launches:
        chosen = " ".join(f"{name}={size}" for name, size in sizes.items() if name not in ("has_bias", "widen"))
        integers = ("1" if n == 1 else "16" if n % 16 == 0 else "any" for n in args if isinstance(n, int))
        kind = f"{str(args[0].dtype).removeprefix('torch.')} has_bias={sizes['has_bias']} {'/'.join(integers)}"
        found.setdefault(chosen, {}).setdefault(kind, (args, sizes))
    return found


def compile_for(arch: int, launch: Launch) -> dict[str, Any]:
    args, sizes = launch
    driver.set_active(Target(arch))
    with contextlib.redirect_stdout(io.StringIO()) as told:
        compiled = KERNEL.warmup(*args, grid=(1, 1), **sizes)
    log = told.getvalue()
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise ValueError(f"ptxas told nothing of registers or spills: {log[:500]!r}")
    return {
        "shared_bytes": compiled.metadata.shared,
        "registers": int(registers[1]),
        "spilled_bytes": int(spills[1]) + int(spills[2]),
        "cubin_bytes": len(compiled.asm["cubin"]),
        "matrix_units": re.search(r"\b(wgmma|mma|tcgen05)\.", compiled.asm["ptx"]) is not None,
    }


def rows(archs: list[int], every: bool) -> Iterator[dict[str, Any]]:
    found = launches()
    for place, arch in enumerate(archs):
        for number, (chosen, kinds) in enumerate(found.items()):
            one = [list(kinds)[(5 * number + 7 * place) % len(kinds)]]  # steps that share no factor with their number
            for kind in kinds if every else one:
                yield {"arch": arch, "launch": chosen, "kind": kind} | compile_for(arch, kinds[kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every specialization of every launch")
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities without the point")
    args = parser.parse_args()
    archs = [int(arch) for arch in args.arch.split(",")]
    knobs.nvidia.dump_ptxas_log = True
    document: dict[str, Any] = {"rows": []}
    try:
        for arch in archs:
            get_ptxas(arch)
    except RuntimeError as e:
        document = {"missing": str(e)}
    else:
        for row in rows(archs, args.all):
            print(*row.values(), flush=True)
            document["rows"].append(row)
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
