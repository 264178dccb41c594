"""vLLM's scratch memory while several sets of CUDA graphs are captured.

vLLM captures once and locks its workspace behind it, because captured graphs read it where it lay. A later set
may need entries of its own, so the lock is opened for it; but where that moves what an earlier set has captured, the
start fails: those graphs would read memory that somebody else has.
"""

from __future__ import annotations

from morphserve.errors import ConfigError


class SharedWorkspace:
    """One for all graph sets of a rank: `open` before each capture, `check` behind it. The last leaves it locked."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []  # (address, bytes) of each buffer, behind the graph set before

    def open(self) -> None:
        """Open it before a capture; the first finds it open."""
        from vllm.v1.worker import workspace

        if workspace.is_workspace_manager_initialized():
            workspace.unlock_workspace()

    def check(self) -> None:
        """Check it behind a capture.

        Raises:
            ConfigError: the workspace has moved away under the graphs of an earlier graph set.
        """
        now = _buffers()
        for (address, num_bytes), (new_address, new_bytes) in zip(self._seen, now, strict=False):
            if num_bytes and address != new_address:
                raise ConfigError(
                    f"CUDA graphs: a level of the ladder needs a workspace of {new_bytes:,} B, and graphs of levels "
                    f"before it were captured with one of {num_bytes:,} B that they would still read. Leave the "
                    "format that needs it out of ladder.steps, or start with --enforce-eager."
                )
        self._seen = now


def _buffers() -> list[tuple[int, int]]:
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():
        return []
    buffers = workspace.current_workspace_manager()._current_workspaces
    return [(0, 0) if buffer is None else (buffer.data_ptr(), buffer.nbytes) for buffer in buffers]
