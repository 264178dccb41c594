"""Our Triton kernel compiled for GPUs that are not here: every launch that can be chosen, within what a GPU gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that a block may have, by compute capability


def test_every_launch_compiles_and_fits(tmp_path: Path) -> None:
    """Guards: a block that a GPU refuses at the first request, or that keeps its sums in memory instead of registers.

    On none of the three does a launch spill today, in any of its specializations. On sm_86 and sm_89, which are not
    compiled here, 64 rows spill 12 bytes.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "triton_ahead.py", "--arch", ",".join(map(str, SHARED_BYTES))],
        capture_output=True, text=True, check=False,
        # A cache of its own: of what is found in one ptxas says nothing.
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    if "missing" in document:
        pytest.skip(document["missing"])
    rows = document["rows"]
    launches = Counter(row["launch"] for row in rows)
    assert len(launches) >= 3 and set(launches.values()) == {len(SHARED_BYTES)}, launches
    assert [row for row in rows if row["shared_bytes"] > SHARED_BYTES[row["arch"]]] == []
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert [row for row in rows if not row["matrix_units"] or not row["cubin_bytes"]] == []
    assert {row["kind"].split()[0] for row in rows} == {"bfloat16", "float16"}
