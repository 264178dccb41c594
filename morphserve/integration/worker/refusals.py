"""What vLLM lets a caller do to a running engine's weights, and MorphServe must not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from morphserve.errors import ConfigError
from morphserve.integration import seams

# Each writes to, or reads, every parameter of the model, wherever it is.
_TARGETS = (
    "reload_weights",
    "start_weight_update",
    "update_weights",
    "reset_weights",
    "compute_weight_checksums",
    "save_sharded_state",
    "save_tensorized_model",
)


def check_weight_access(name: str) -> None:
    """Refuse a method of workers that is about the weights.

    Raises:
        ConfigError: it is one.
    """
    if name in _TARGETS:
        raise ConfigError(
            f"{name}: MorphServe swaps decoder layers, and those that are swapped out are not in the model's "
            "parameters; a restore brings back the weights of the start. Restart the server with the new weights, or "
            "start without --plugin morphserve."
        )


def refuse_weight_access(is_ours: Callable[[], bool]) -> None:
    """Re-entrant. From now on these methods of workers raise, where `is_ours` says that layers come and go."""
    for name in _TARGETS:
        seams.wrap(seams.WORKER_WEIGHTS, _refusal(name, is_ours), name=name)


@functools.cache  # the same maker for the same question, so that `wrap` knows it again
def _refusal(name: str, is_ours: Callable[[], bool]) -> Callable[[Callable[..., Any]], Any]:
    def make(original: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_ours():
                check_weight_access(name)
            return original(self, *args, **kwargs)

        return refused

    return make
