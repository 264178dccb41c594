"""Errors of this package: each message says the value, the limit and the remedy."""

from __future__ import annotations


class KVResizeError(RuntimeError):
    """A request this cache cannot carry out; its state is unchanged."""


class BackingError(KVResizeError):
    """The system refused memory, or an access left what is mapped."""

    def __init__(self, message: str, available_bytes: int | None = None) -> None:
        """Set `available_bytes`: what could have been had, where that is known."""
        self.available_bytes = available_bytes
        super().__init__(message)


class PageError(KVResizeError):
    """The device refused a call of its memory management, which has then done nothing."""


class MapError(KVResizeError):
    """`ElasticCache.map` failed and was undone."""

    def __init__(self, num_blocks: int, num_mapped: int, num_possible: int, cause: str) -> None:
        """Set `num_possible`: how many blocks could have been mapped, an estimate from what the system gave."""
        self.num_blocks = num_blocks
        self.num_mapped = num_mapped
        self.num_possible = num_possible
        super().__init__(
            f"cannot map {num_blocks} KV blocks: {cause} {num_mapped} stay mapped, about {num_possible} "
            "would have fitted. Free memory or lower the target."
        )
