"""Settings of a server that its scheduler obeys; and of one that is simulated, how the client treats it, too."""

from __future__ import annotations

from dataclasses import dataclass

from morphserve.errors import ConfigError
from morphserve.tools.options import option


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """One engine's settings as vLLM's, whether it is started, simulated or tuned for.

    Raises:
        ConfigError: what vLLM itself would refuse.
    """

    num_blocks: int = option(
        "KV blocks at full precision, null block included; 0 = as many as vLLM finds memory for, on a real server",
        default=49,
    )
    block_size: int = option("tokens per KV block", default=32)
    max_model_len: int = option(default=512)
    max_num_seqs: int = option(default=64)
    max_num_batched_tokens: int = option("as of vllm serve, simulated", default=2048, metavar="N")
    # A step is planned before the tokens of the one before are known.
    async_scheduling: bool = option("as of vllm serve, simulated", default=False)
    prefix_caching: bool = option("on in all runs", default=False)
    # Prompt tokens without a first token, from which on requests get a 503.
    max_num_queued_tokens: int | None = option(
        "as of vllm serve, simulated: beyond it a 503", default=None, type=int, metavar="N"
    )

    def __post_init__(self) -> None:
        for name in ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be 1 or more.")
        if self.num_blocks < 0:
            raise ConfigError(f"num_blocks is {self.num_blocks}, must be 0 or more.")
        if self.max_num_queued_tokens is not None and self.max_num_queued_tokens < 0:
            raise ConfigError(f"max_num_queued_tokens is {self.max_num_queued_tokens}, must be 0 or more, or left out.")


@dataclass(frozen=True, slots=True)
class SimServer(ServerSpec):
    """A server that is simulated.

    Raises:
        ConfigError: what vLLM itself would refuse, or what is no time.
    """

    request_timeout_s: float = 300.0  # the client gives up on one request
    cutoff_s: float = 120.0  # after the last arrival the run ends
    restore_wait_s: float = 30.0  # after that it is watched until level 0, so long at most
    wake_interval_s: float = 0.1  # an idle engine above level 0 makes a step so often
    idle_step_s: float = 0.001  # a step without work
    copy_s: float = 0.0002  # a block that a shrink moves
    snapshot_s: float = 0.5
    step_noise: float = 0.0  # standard deviation of a step's time, relative; drawn by the seed

    def __post_init__(self) -> None:
        ServerSpec.__post_init__(self)  # super() without arguments does not know a class with slots
        if not self.num_blocks:
            raise ConfigError("num_blocks is 0: a simulated server has no memory to find blocks in. Give a number.")
        # Not of every server: one that is started has vLLM's own limit where none is given.
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "a step could not serve all running requests. Raise it; vLLM refuses that too."
            )
        for name in ("request_timeout_s", "wake_interval_s", "idle_step_s", "snapshot_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be above 0 s.")
        for name in ("cutoff_s", "restore_wait_s", "copy_s", "step_noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be 0 or more.")
