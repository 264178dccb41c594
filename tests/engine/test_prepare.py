"""`morphserve prepare`, as a user runs it, and the engine that finds what it has made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import first_layers
from engine.harness import engine, morph_of

from morphserve.cpu_tier import best_dtype


def prepared(model: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "morphserve", "prepare", model, "--dtype", best_dtype(), "--enforce-eager"]
    command += ["--windows", 1, "--max-model-len", 512, "--max-num-seqs", 4, "--max-num-batched-tokens", 256]
    done = subprocess.run([*map(str, command), "--cache-dir", str(cache), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.mark.skipif("MORPHSERVE_SLOW_TESTS" not in os.environ, reason="minutes; by hand: MORPHSERVE_SLOW_TESTS=1")
@pytest.mark.timeout(1800)
def test_what_was_prepared_is_served(demo_model: Path, tmp_path: Path) -> None:
    """Guards: parts that work by themselves and not one after the other; a store that the server does not find, or
    finds and does not serve; work that is done again each time."""
    model, cache = first_layers(demo_model, tmp_path / "model", 4), tmp_path / "cache"
    made = prepared(model, cache)
    files = {file: file.stat().st_mtime_ns for file in (cache / "prepared").rglob("*") if file.is_file()}
    assert files
    again = prepared(model, cache)
    assert [again[key] for key in ("profile", "step_times")] == [made[key] for key in ("profile", "step_times")]
    assert {file: file.stat().st_mtime_ns for file in files} == files
    manifest = json.loads((Path(made["profile"]) / "manifest.json").read_text())
    with engine(model, cache, {"prepared": True, "ladder": {}, "policy": {"kind": "slo"}}) as llm:
        morph = morph_of(llm)
        ladder, status = morph.runtime.ladder, morph.controller.status()
        assert status["predictions"] == "calibrated"
        measured = [row["measured_kl"] for row in manifest["ladder"]]
        assert [level.expected_kl for level in ladder] == measured[: len(ladder)] and len(ladder) > 2
