"""What of MorphServe's NVIDIA path holds on this machine? Nine parts, each in a process and a time of its own.

t1 paged arena, t2 mapping beside decode, t3 copies beside decode, t4 pages recycled with checksums, t5 kernels
against cuBLAS, t6 a small engine with a graph set per level, t7 the opaque linear under torch.compile, t8 stock vLLM,
t9 vLLM with the plugin. The report, gpu_check.json and gpu_check.md, is written after each part: one that crashes,
hangs or is killed takes nothing along. What no longer fits into --minutes is reported as "no time".

Output columns: figure, unit, median, quartiles, p99, least to most, repeats; for each part ok, failed, skipped or no
time, with the reason; for each criterion whether it holds. Exit code: 0 no part failed, 1 one has, 3 no NVIDIA device,
4 none failed but there was no time for some. Last stdout line: one JSON document.

    python scripts/gpu_check.py --minutes 9 --out reports/gpu_check
    python scripts/gpu_check.py --only t1,t3
    python scripts/gpu_check.py --device cpu --dry-run      # tries the code paths without a GPU, measures nothing
"""

from __future__ import annotations

from morphserve.tools.gpucheck import main

if __name__ == "__main__":
    raise SystemExit(main(description=__doc__))
