"""How much memory a worst-case forward pass takes beside everything else: measured, not assumed.

Growth may not take the memory that the next long prefill needs. So before anything is published the ranks run the worst
case of vLLM's own (`profile_run`: max_num_batched_tokens tokens, max_num_seqs requests sampled) with a layer in each
format of the ladder, since each kernel has scratch memory of its own. What it took at most is kept free whenever blocks
are mapped. The figure is stored beside the variants, for the next start.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import vllm
from vllm.v1.worker.cpu_model_runner import _set_global_compilation_settings

from morphserve.files import write_whole
from morphserve.integration.worker.layers import RankLayers
from morphserve.residence import peak_beyond_now
from policies import BASE_FORMAT

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

logger = logging.getLogger("vllm.morphserve")

_FILE = "worst_forward.json"
_RUNS = 2  # the system's allocator makes the same pass differ by 10 to 15 %: the larger one counts
# What a pass takes beyond what is resident depends on what the allocator still holds from before: in fresh processes
# the same dummy pass took 71 to 100 MiB and the same full prefill 40 to 98 (SmolLM2-135M, 2,048 tokens), at most 1.4 of
# the dummy's. vLLM's dummy pass also skips the attention, which on CPU needs scratch for a few rows of scores only.
_MARGIN = 2.0


def known(worker: WorkerBase, layers: RankLayers) -> int | None:
    """Bytes that this rank's worst forward pass takes at most, at any level; None = to be measured.

    Args:
        worker: vLLM's.
        layers: this rank's `RankLayers`.
    """
    return _read(_file(layers)).get(_conditions(worker, layers))


def measure(worker: WorkerBase, layers: RankLayers) -> int:
    """Measure what its worst forward pass takes, and store it. All ranks at once, at full precision."""
    config = worker.vllm_config

    def forward() -> None:
        with _set_global_compilation_settings(config):
            worker.model_runner.profile_run()

    mixtures = list(_mixtures(list(layers.linears), (BASE_FORMAT, *layers.kernels)))
    # Said beforehand: a pass takes a minute and more where a core serves a model of some billion weights.
    logger.info(
        "morphserve: rank %d measures what a worst-case forward pass takes, once for this model and these limits: "
        "%d passes of %d tokens (--max-num-batched-tokens)",
        worker.rank, 1 + _RUNS * len(mixtures), config.scheduler_config.max_num_batched_tokens,
    )  # fmt: skip
    state = torch.get_rng_state()
    forward()  # what is allocated once and stays (buffers, compiled code) is not the price of a forward pass
    size = 0
    for mixed in mixtures:
        with _in_formats(layers, mixed):
            size = max(size, *(int(_MARGIN * peak_beyond_now(forward)) for _ in range(_RUNS)))
    torch.set_rng_state(state)
    logger.info("morphserve: rank %d, a worst-case forward pass takes %.0f MiB", worker.rank, size / 2**20)
    file = _file(layers)
    _write(file, _read(file) | {_conditions(worker, layers): size})
    return size


def _mixtures(layers: Sequence[int], formats: Sequence[str]) -> Iterator[dict[int, str]]:
    """Layer |-> format, until each format had a layer: in one go if there are enough, since a pass takes seconds."""
    for start in range(0, len(formats), len(layers)):
        yield dict(zip(layers, formats[start:], strict=False))


@contextmanager
def _in_formats(layers: RankLayers, mixed: Mapping[int, str]) -> Iterator[None]:
    """Inside, layers are in these formats: a kernel's scratch memory is gone when it returns, so one layer tells."""
    layers.switch(mixed)
    try:
        yield
    finally:
        layers.switch(dict.fromkeys(mixed, BASE_FORMAT))


def _file(layers: RankLayers) -> Path:
    assert layers.directory is not None
    return layers.directory / _FILE


def _conditions(worker: WorkerBase, layers: RankLayers) -> str:
    """Return what the figures depend on, besides the formats."""
    config = worker.vllm_config
    return json.dumps(
        {
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "compiled": int(config.compilation_config.mode),
            "threads": torch.get_num_threads(),
            "kernels": {fmt: kernel.name for fmt, kernel in layers.kernels.items()},
            "ranks": config.parallel_config.world_size,
            "layers": len(layers.linears),  # of this pipeline stage
            "margin": _MARGIN,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        },
        sort_keys=True,
    )


def _read(file: Path) -> dict[str, int]:
    try:
        return {key: int(size) for key, size in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # absent, damaged, or of another release: measured again


def _write(file: Path, figures: Mapping[str, int]) -> None:
    try:
        write_whole(file, json.dumps(figures, indent=1))
    except OSError as e:
        logger.warning("morphserve: %s cannot be kept (%s); it is measured again at the next start", file, e)
