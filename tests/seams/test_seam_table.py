"""The seam tables name what the code of `morphserve/integration` uses of vLLM's objects, and nothing else."""

from __future__ import annotations

import ast
import enum
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from morphserve import integration
from morphserve.integration import seams
from morphserve.integration.seams import rows as table
from morphserve.integration.seams.check import instance_attributes

_CODE = sorted(Path(integration.__file__).parent.rglob("*.py"))
# Code |-> its rows: what is shared, and what the device path needs beyond.
_HOST = tuple(path for path in _CODE if path.parent.name != "cuda" and not path.name.startswith("device_"))
_DEVICE = tuple(_CODE)
_EVERY = (*seams.SEAMS, *seams.CUDA_SEAMS)
# A list has `append` and the free queue too: by name alone, these say nothing.
_COMMON = set().union(*map(dir, (list, dict, set, str, logging.Logger, BaseException, object)))
# vLLM classes have attributes of these names, but the code means its own or another library's.
_OURS = {
    "_cache",
    "_pool",
    "cache_dir",
    "compile",
    "dtype",
    "free",
    "load_config",
    "policy",
    "pool",
    "profile",
    "register",
    "reset",
}
_OURS |= {"revision", "sleep", "status", "_executor", "clone", "verify", "__del__"}
_OURS |= {"enforce_eager", "temperature", "max_tokens", "ignore_eos", "cpu"}  # arguments, keys of a request, figures
_OURS |= {"prompt_token_ids", "positions", "config"}  # keys: of a prompt, of what measuring prints; our settings
_OURS |= {"device", "pin_memory", "gpu"}  # of tensors; and the V2 runner's tables, which no CPU has
_OURS |= {"__call__", "capture", "set_device"}  # of our linears, of our graph sets; torch.cuda's
_OURS |= {"inference_mode", "__getattr__"}  # torch's; of a door that loads late
_OURS |= {"forward"}  # of our modules
_OURS |= {"metrics"}  # our module, and what vLLM keeps of a request is not asked for
_OURS |= {"worker", "monitor_workers"}  # our module; a function that logs, and the flag that starts it
_OURS |= {"output_processor"}  # the module of two rows, not the object that others have
_OURS |= {"abort"}  # of a rank's transition, not the client's
_OURS |= {"name", "path"}  # of kernels, slots and seams; of files
_ADDED = "morphserve_"  # what we add to their classes, as an engine started earlier in this process did


def used_names(code: tuple[Path, ...]) -> set[str]:
    """Every attribute that the integration code reads, writes, overrides or asks for by name."""
    found = set()
    for path in code:
        # The tables, what checks them, and the engine of a check that says itself what is gone.
        if path.parent.name == "seams" or path.stem == "gpu_smoke":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
                if isinstance(row := getattr(table, node.attr, None), seams.Seam):  # what is patched by its row
                    found |= set(row.target.replace(":", ".").split("."))
            elif isinstance(node, ast.FunctionDef | ast.alias):
                found.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(node.value.replace(":", ".").split("."))
    return {name for name in found if not name.startswith(_ADDED)}


def classes(rows: tuple[seams.Seam, ...]) -> dict[str, Any]:
    """The vLLM classes that a table speaks of, by name."""
    found = {}
    for seam in rows:
        owner, _, value = seams.resolve(seam.target)
        for one in (owner, value):
            theirs = inspect.isclass(one) and one.__module__.startswith("vllm.")
            if theirs and not issubclass(one, torch.nn.Module | enum.Enum):  # rows name what we use of those
                found[one.__name__] = one
    return found


def listed_names(rows: tuple[seams.Seam, ...]) -> set[str]:
    paths = {part for seam in rows for part in seam.target.partition(":")[2].split(".")}
    return paths.union(*(seam.attributes for seam in rows))


@pytest.mark.parametrize(("code", "rows"), [(_HOST, seams.SEAMS), (_DEVICE, _EVERY)], ids=["host", "device"])
def test_what_the_code_uses_has_a_row(code: tuple[Path, ...], rows: tuple[seams.Seam, ...]) -> None:
    """Guards: vLLM renames a method that we call, the table holds, and the server breaks in its first burst."""
    used = used_names(code) - listed_names(rows) - _COMMON - _OURS
    missing = {n: found for n, cls in classes(rows).items() if (found := used & instance_attributes(cls))}
    assert missing == {}, "add rows to morphserve/integration/seams/rows.py, or for a device to cuda.py"


@pytest.mark.parametrize(
    ("code", "rows"), [(_HOST, seams.SEAMS), (_DEVICE, seams.CUDA_SEAMS)], ids=["host", "device"]
)
def test_each_row_is_used(code: tuple[Path, ...], rows: tuple[seams.Seam, ...]) -> None:
    """Guards: a row for what we no longer need refuses a vLLM that would do."""
    by_plugin = {"add_cli_args", "from_cli_args", "create_engine_config", "load_endpoint_plugins"}
    by_plugin |= {"OPENAI_API_SERVER"}
    used = used_names(code) | by_plugin
    for seam in rows:
        last = seam.target.replace(":", ".").rpartition(".")[2]  # of a class with attributes, no code may say it
        unused = set(seam.attributes or (last,)) - used
        assert not unused, (seam.name, unused)


def test_a_lost_attribute_is_seen() -> None:
    """Guards: a row with attributes holds whatever the class has become."""
    pool = "vllm.v1.core.block_pool:BlockPool"
    assert seams.check_seam(seams.Seam("kept", pool, (), "test", ("blocks", "get_usage"))).ok
    gone = seams.check_seam(seams.Seam("gone", pool, (), "test", ("blocks", "no_such_attribute")))
    assert not gone.ok and gone.detail == "instances have no ['no_such_attribute']"
