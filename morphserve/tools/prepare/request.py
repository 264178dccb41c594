"""What is asked for: a model, served in one way."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from morphserve.prepared import this_machine, vllm_version


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
        values = [asdict(self), this_machine(), vllm_version()]
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
