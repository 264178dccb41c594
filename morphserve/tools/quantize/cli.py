"""Quantize MODEL to 4 bits with calibration, into a checkpoint that `variants:` can name. AWQ or GPTQ.

Runs llm-compressor, which pins other versions of transformers and compressed-tensors than vLLM does, in a virtual
environment of its own (built once, about 2 minutes). Works without a GPU: SmolLM2-135M takes some minutes on two
cores. Mix domains in --text: GPTQ fits one domain and loses on others.

Last stdout line: one JSON document {"checkpoint", "method", "bits", "group_size", "seconds"}.

    python scripts/quantize.py MODEL --method awq --text wikitext2-valid.txt --out checkpoints/smollm2-awq
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from commands import command_parser, finish

PACKAGES = ("llmcompressor==0.14.0.1", "accelerate>=1.0")
GROUP_SIZES = (128, 64, 32)
ENVIRONMENT = Path("~/.cache/morphserve/quantize-env").expanduser()


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("model", help="directory or hub name of the full-precision model")
    parser.add_argument("--method", choices=["awq", "gptq"], default="awq")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="calibration text, one domain each")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint; must not exist yet")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, help="default: the largest that fits the model")
    parser.add_argument("--samples", type=int, default=8, help="windows per text")
    parser.add_argument("--grid", type=int, default=10, help="AWQ: scalings tried for each norm; time grows with it")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where llm-compressor is installed")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out.exists():
        sys.stderr.write(f"quantize: {args.out} exists; give another --out, or delete it\n")
        return 1
    if args.inside:
        return _quantize(args)
    python = _environment(args.environment)
    if python is None:
        return 1
    return subprocess.run([str(python), __file__, *(sys.argv[1:] if argv is None else argv), "--inside"]).returncode


def _environment(directory: Path) -> Path | None:
    """Return the environment's interpreter; install what is missing."""
    python = directory / "bin" / "python"
    stamp = directory / "installed"
    if stamp.exists() and stamp.read_text() == " ".join(PACKAGES):
        return python
    sys.stderr.write(f"quantize: installing {PACKAGES[0]} into {directory}: a few minutes, once\n")
    for command in (
        [sys.executable, "-m", "venv", str(directory)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
    ):
        if (code := subprocess.run(command, stdout=sys.stderr).returncode) != 0:
            sys.stderr.write(f"quantize: {' '.join(command[:4])} ... ended with {code}; see above\n")
            return None
    stamp.write_text(" ".join(PACKAGES))
    return python


def _quantize(args: argparse.Namespace) -> int:
    """Quantize, in the environment of llm-compressor."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.perf_counter()
    if not torch.cuda.is_available():
        _do_without_pinned_memory()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    group_size = args.group_size or _group_size(model)
    rows = []
    for file in args.text:
        ids = tokenizer.encode(file.read_text(encoding="utf-8"))
        if len(ids) < args.samples * args.length:
            need = args.samples * args.length
            sys.stderr.write(f"quantize: {file} has {len(ids):,} tokens, {need:,} are needed; lower --samples\n")
            return 1
        stride = len(ids) // args.samples
        rows += [ids[i * stride : i * stride + args.length] for i in range(args.samples)]
    weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=group_size, symmetric=args.method == "gptq"
    )
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * args.length] * len(rows)}),
        recipe=_modifiers(args.method, scheme, args.grid),
        max_seq_length=args.length,
        num_calibration_samples=len(rows),
    )
    partial = args.out.with_name(f".{args.out.name}.partial")
    model.save_pretrained(partial, save_compressed=True)
    tokenizer.save_pretrained(partial)
    os.replace(partial, args.out)
    return finish({
        "checkpoint": str(args.out), "method": args.method, "bits": 4, "group_size": group_size,
        "seconds": round(time.perf_counter() - start, 1),
    })  # fmt: skip


def _modifiers(method: str, scheme: object, grid: int) -> list[object]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if method == "gptq":
        return [GPTQModifier(config_groups=scheme, ignore=["lm_head"])]
    return [AWQModifier(n_grid=grid), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])]


def _group_size(model: object) -> int:
    """Return the largest group that divides the inputs of every decoder linear."""
    import torch

    sizes = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}  # type: ignore[attr-defined]
    return next(size for size in GROUP_SIZES if all(k % size == 0 for k in sizes))


def _do_without_pinned_memory() -> None:
    """Keep llm-compressor 0.14 from pinning its cache, which torch refuses where there is no accelerator."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache._pin_intermediate = classmethod(lambda cls, value: None)


if __name__ == "__main__":
    raise SystemExit(main())
