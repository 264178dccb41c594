"""What is asked for: a model, served in one way."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from morphserve.prepared import this_machine, vllm_version
from morphserve.tools.machine import installed_version

_NVIDIA = Path("/proc/driver/nvidia/gpus")  # a directory for each GPU; asking CUDA would take memory of one
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Request:
    """A model, and the options of the server that it is prepared for."""

    model: str  # directory
    dtype: str  # as vLLM takes it
    tensor_parallel: int
    pipeline_parallel: int
    enforce_eager: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int | None

    @property
    def name(self) -> str:
        """Of what was found out about the server: it depends on the machine and on vLLM, too."""
        build = installed_version("vllm") or vllm_version()  # of a CPU or of a GPU, which `vllm_version` leaves out
        values = [asdict(self), this_machine(), build, os.environ.get(_VISIBLE), _gpus()]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def parallel_words(self) -> list[str]:
        """Of a command line."""
        return ["-tp", str(self.tensor_parallel), "-pp", str(self.pipeline_parallel)]

    @property
    def server_words(self) -> list[str]:
        """Of `vllm serve`, where they are not its defaults."""
        words = [] if self.dtype == "auto" else ["--dtype", self.dtype]
        words += [] if self.tensor_parallel == 1 else ["-tp", str(self.tensor_parallel)]
        words += [] if self.pipeline_parallel == 1 else ["-pp", str(self.pipeline_parallel)]
        return words + (["--enforce-eager"] if self.enforce_eager else [])


def _gpus() -> list[str]:
    """Return what the driver says of each GPU, so that another one of the host is another place."""
    with suppress(OSError):
        return [file.read_text(encoding="utf-8") for file in sorted(_NVIDIA.glob("*/information"))]
    return []
