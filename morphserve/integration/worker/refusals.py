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
# vLLM itself loads the model by the first, at start; the second hands the model to a function.
_NOT_BY_RPC = ("load_model", "apply_model")
_KEEPS_WEIGHTS = "morphserve_keeps_weights"


def keeps_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of workers as one that leaves their weights alone, so that `collective_rpc` takes it."""
    setattr(function, _KEEPS_WEIGHTS, True)
    return function


def check_weight_access(method: str | Callable[..., Any]) -> None:
    """Refuse a method of workers that is about the weights, and a function that may be.

    Raises:
        ConfigError: it is one.
    """
    if isinstance(method, str):
        _refuse(method, method in (*_TARGETS, *_NOT_BY_RPC), "")
        return
    name, module = getattr(method, "__qualname__", repr(method)), getattr(method, "__module__", None) or ""
    is_known = module.split(".")[0] == "morphserve" or getattr(method, _KEEPS_WEIGHTS, False)
    _refuse(f"function {name}", not is_known, f"; one that leaves weights alone says so by {_KEEPS_WEIGHTS} = True")


def _refuse(what: str, is_refused: bool, remedy: str) -> None:
    if is_refused:
        raise ConfigError(
            f"{what}: MorphServe swaps decoder layers, and those that are swapped out are not in the model's "
            "parameters; a restore brings back the weights of the start. Restart the server with the new weights, or "
            f"start without --plugin morphserve{remedy}."
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
