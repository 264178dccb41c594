"""The server that is simulated: the settings of vLLM that its scheduler obeys, and how the client treats it."""

from __future__ import annotations

from dataclasses import dataclass

from morphserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SimServer:
    """Of one engine.

    Raises:
        ConfigError: what vLLM itself would refuse, or what is no time.
    """

    num_blocks: int  # KV blocks at full precision, null block included
    block_size: int  # tokens
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    async_scheduling: bool = False  # a step is planned before the tokens of the one before are known
    prefix_caching: bool = False
    max_num_queued_tokens: int | None = None  # prompt tokens without a first token, from which on requests get a 503
    request_timeout_s: float = 300.0  # the client gives up on one request
    cutoff_s: float = 120.0  # after the last arrival the run ends
    restore_wait_s: float = 30.0  # after that it is watched until level 0, so long at most
    wake_interval_s: float = 0.1  # an idle engine above level 0 makes a step so often
    idle_step_s: float = 0.001  # a step without work
    copy_s: float = 0.0002  # a block that a shrink moves
    snapshot_s: float = 0.5
    step_noise: float = 0.0  # standard deviation of a step's time, relative; drawn by the seed

    def __post_init__(self) -> None:
        for name in ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be 1 or more.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "a step could not serve all running requests. Raise it; vLLM refuses that too."
            )
        if self.max_num_queued_tokens is not None and self.max_num_queued_tokens < 0:
            raise ConfigError(f"max_num_queued_tokens is {self.max_num_queued_tokens}, must be 0 or more, or left out.")
        for name in ("request_timeout_s", "wake_interval_s", "idle_step_s", "snapshot_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be above 0 s.")
        for name in ("cutoff_s", "restore_wait_s", "copy_s", "step_noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be 0 or more.")
