"""`morphserve quantize`: the environment that it runs in, and models that have no 4-bit form."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphserve.tools.quantize import cli, compress

pytestmark = pytest.mark.cpu


def test_an_environment_without_its_python_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a traceback after the Python that an environment was made with has been upgraded away."""
    commands: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(cli.subprocess, "run", run)
    python = tmp_path / "bin" / "python"
    (tmp_path / "installed").write_text(" ".join(cli.PACKAGES))
    assert cli._environment(tmp_path, "quantize") == python and len(commands) == 2
    python.parent.mkdir()
    python.touch()
    assert cli._environment(tmp_path, "quantize") == python and len(commands) == 2


def test_a_model_that_no_group_size_fits_is_refused() -> None:
    """Guards: a traceback that ends with StopIteration, after the model was loaded."""
    fits, odd = torch.nn.Linear(64, 8), torch.nn.Linear(100, 8)
    assert compress._group_size(torch.nn.Sequential(fits), [128, 64, 32]) == 64
    assert compress._group_size(torch.nn.Sequential(fits, odd), [50]) == 50, "who names one means it"
    with pytest.raises(ValueError, match=r"128, 64, 32 divides the inputs of all linears \(\[64, 100\]\)"):
        compress._group_size(torch.nn.Sequential(fits, odd), [128, 64, 32])
