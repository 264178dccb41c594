"""The seam check that reads sources says of the installed vLLM what the one that imports it says."""

from __future__ import annotations

import dataclasses
import json

import check_seams
import pytest

pytest.importorskip("vllm")

from morphserve.integration.seams import check as seams  # noqa: E402
from morphserve.integration.seams import source as seam_source
from morphserve.integration.seams.cuda import CUDA_KERNEL_SEAMS, CUDA_SEAMS  # noqa: E402
from morphserve.integration.seams.rows import SEAMS, Seam  # noqa: E402
from morphserve.integration.seams.tree import SourceTree  # noqa: E402

ROWS = (*SEAMS, *CUDA_SEAMS, *CUDA_KERNEL_SEAMS)


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    path = check_seams.installed()
    assert path is not None
    return SourceTree(path)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_both_checks_agree(tree: SourceTree, row: Seam) -> None:
    """Guards: sources of a vLLM that cannot be imported are judged by other rules than the one that runs here."""
    read, imported = seam_source.check_seam(row, tree), seams.check_seam(row)
    assert read.ok and imported.ok, (read.detail, imported.detail)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_both_checks_see_a_loss(tree: SourceTree, row: Seam) -> None:
    """Guards: a class or a signature that could not be followed counts as one that has everything."""
    for lost in (
        dataclasses.replace(row, target=f"{row.target}_that_is_gone"),
        dataclasses.replace(row, params=(*row.params, "no_such_parameter")),
        dataclasses.replace(row, attributes=(*row.attributes, "no_such_attribute")),
    ):
        assert not seam_source.check_seam(lost, tree).ok
        if "current_platform" not in lost.target:  # a Platform answers None for whatever it lacks
            assert not seams.check_seam(lost).ok


def test_rows_can_be_told_apart() -> None:
    """Guards: a message names a row, and there are two of that name."""
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) and all(row.why for row in ROWS)


def test_the_script_checks_the_installed_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the table is printed from one source, and the JSON and the exit status from another."""
    assert check_seams.main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["ok"] and found["num_rows"] == len(lines) == len(ROWS) + 1
    assert all(row["holds"] for row in found["seams"])
