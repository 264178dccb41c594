"""The parts, T1 to T11, in the order in which they run: what decides most comes first, what takes longest last."""

from __future__ import annotations

from dataclasses import dataclass

_HERE = "morphserve.tools.gpucheck.parts"


@dataclass(frozen=True, slots=True)
class Part:
    """One part: a function that is called with a bench."""

    key: str
    title: str
    module: str  # "module", of which `run` is called, or "module:function"
    budget_s: float  # killed after this
    least_s: float  # not started with less


PARTS: tuple[Part, ...] = (
    Part("t1", "paged arena, and a graph captured before it grew", f"{_HERE}.arena", 40, 15),
    Part("t2", "decode beside pages that are mapped, unmapped, moved", f"{_HERE}.remap", 50, 25),
    Part("t3", "decode beside copies from pinned memory", f"{_HERE}.copy", 50, 25),
    Part("t4", "pages from weights to KV and back, checksummed", f"{_HERE}.recycle", 60, 20),
    Part("t5", "W4A16, W8A16 and fp8 against bf16 cuBLAS", f"{_HERE}.kernels", 110, 45),
    Part("t6", "small engine: a set of graphs per level, layers swapped while decoding", f"{_HERE}.engine", 100, 40),
    Part("t7", "opaque linear under torch.compile", f"{_HERE}.opaque", 70, 25),
    Part("t8", "stock vLLM", f"{_HERE}.vllm", 200, 60),
    Part("t9", "vLLM with the plugin: a small model, no graphs", f"{_HERE}.plugin:eager", 150, 90),
    Part("t10", "vLLM with the plugin: a small model, compiled, with graphs", f"{_HERE}.plugin:compiled", 260, 150),
    Part("t11", "vLLM with the plugin: the shape of an 8B", f"{_HERE}.plugin:large", 330, 150),
)


def choose(only: str, skip: str) -> tuple[Part, ...]:
    """Return the parts that `--only` and `--skip` leave, in their order.

    Args:
        only: keys with commas between; empty = all.
        skip: likewise; empty = none.

    Raises:
        ValueError: a key that no part has, or nothing left.
    """
    wanted, unwanted = _keys(only), _keys(skip)
    known = [part.key for part in PARTS]
    if unknown := sorted((wanted | unwanted) - set(known)):
        raise ValueError(f"no part {', '.join(unknown)}; there are {', '.join(known)}.")
    chosen = tuple(p for p in PARTS if (not wanted or p.key in wanted) and p.key not in unwanted)
    if not chosen:
        raise ValueError(f"--only {only} --skip {skip} leaves no part; there are {', '.join(known)}.")
    return chosen


def _keys(text: str) -> set[str]:
    return {key.strip().lower() for key in text.split(",") if key.strip()}
