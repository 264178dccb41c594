"""Quantizes a model with llm-compressor. Run as a file, by the Python that has it: nothing of ours can be imported.

Its one argument is a JSON document, the job that `cli.py` makes of the command line; its last stdout line is another.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> int:
    """Write the checkpoint, whole or not at all; returns the exit status."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.perf_counter()
    if not torch.cuda.is_available():
        _do_without_pinned_memory()
    try:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        rows = [row for file in job["text"] for row in _windows(tokenizer, Path(file), job["samples"], job["length"])]
        group_size = _group_size(model, job["group_sizes"])
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{job['prog']}: {' '.join(str(error).split())}\n")
        return 1
    weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=group_size, symmetric=job["method"] == "gptq"
    )
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * job["length"]] * len(rows)}),
        recipe=_modifiers(job["method"], scheme, job["grid"]),
        max_seq_length=job["length"],
        num_calibration_samples=len(rows),
    )
    out = Path(job["out"])
    partial = out.with_name(f".{out.name}.partial")
    model.save_pretrained(partial, save_compressed=True)
    tokenizer.save_pretrained(partial)
    os.replace(partial, out)
    document = {
        "checkpoint": str(out), "method": job["method"], "bits": 4, "group_size": group_size,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _windows(tokenizer: Any, file: Path, samples: int, length: int) -> list[list[int]]:
    """Cut windows of a text, spread evenly.

    Raises:
        ValueError: it is too short.
    """
    ids = tokenizer.encode(file.read_text(encoding="utf-8"))
    if len(ids) < samples * length:
        raise ValueError(f"{file} has {len(ids):,} tokens, {samples * length:,} are needed; lower --samples")
    stride = len(ids) // samples
    return [ids[i * stride : i * stride + length] for i in range(samples)]


def _modifiers(method: str, scheme: object, grid: int) -> list[object]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if method == "gptq":
        return [GPTQModifier(config_groups=scheme, ignore=["lm_head"])]
    return [AWQModifier(n_grid=grid), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])]


def _group_size(model: Any, sizes: list[int]) -> int:
    """Return the first size, largest first, that divides the inputs of every decoder linear; a lone one as it is.

    Raises:
        ValueError: none does.
    """
    import torch

    if len(sizes) == 1:
        return sizes[0]
    inputs = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
    fitting = (size for size in sizes if all(k % size == 0 for k in inputs))
    if (found := next(fitting, None)) is None:
        raise ValueError(
            f"no group size of {', '.join(map(str, sizes))} divides the inputs of all linears ({sorted(inputs)}): this "
            "model has no W4. Serve it with w8"
        )
    return found


def _do_without_pinned_memory() -> None:
    """Keep llm-compressor 0.14 from pinning its cache, which torch refuses where there is no accelerator."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache._pin_intermediate = classmethod(lambda cls, value: None)


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1])))
