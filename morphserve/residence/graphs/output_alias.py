"""Graphs of one piece that were captured at different formats, made to stand in for each other.

A CUDA graph reads and writes the addresses of its capture. Piece p + 1 of a model was captured while the output of
piece p lay where piece p's graph, at the formats of that pass, had put it. So a piece cannot be combined with a
piece of another pass just because the formats of its own layers agree: it would read what nobody has written. Two
things make every combination sound:

* The first graph set is *home*. Later graphs of a piece end by copying their outputs to where the home graph has them.
  Then all graphs of a piece read the same addresses and write the same addresses. Home's graphs have no copies: at
  level 0 the steps are stock vLLM's.
* Later pieces are captured into a memory pool of their own. What lies between home's pieces looks free to the
  allocator once home's capture is over, and a later piece in that pool would put scratch memory over it. In the other
  pool nothing lives from one piece to the next. Graphs of whole steps of every set do lie over it: no step is made of
  both, and what lies there is written anew in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from morphserve.residence.errors import GraphSetError


class OutputAlias:
    """What a piece runs while a later graph set is captured.

    It acts on the one call that is being captured, whose descriptor is the newest and has no graph yet. Every other
    call, such as a warm-up or the capture of a whole-model graph around it, goes through untouched.
    """

    __slots__ = ("_entries", "_home", "_runnable")

    def __init__(self, runnable: Callable[..., Any], entries: dict[Any, Any], home: Mapping[Any, Any]) -> None:
        """
        Args:
            runnable: the piece.
            entries: what is being captured, by descriptor: values with `cudagraph`, None until captured.
            home: the same piece's graphs of the first graph set: values with `output`.
        """
        self._runnable = runnable
        self._entries = entries
        self._home = home

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the piece, and leave its outputs where the home graph's lie.

        Raises:
            GraphSetError: the home graph set has no graph of this size, or one with other outputs.
        """
        output = self._runnable(*args, **kwargs)
        newest = next(reversed(self._entries), None)
        if newest is None or self._entries[newest].cudagraph is not None:
            return output
        if newest not in self._home:
            raise GraphSetError(
                f"a graph of {newest} is captured for a later set, the first has {len(self._home)} graphs of other "
                "sizes; capture every size of every later set in the first one too"
            )
        return land(output, self._home[newest].output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runnable, name)  # vLLM's wrapper offers what its runnable has


def land(output: Any, home: Any) -> Any:
    """Copy each tensor of `output` to its place in `home`; what is there already, or is no tensor, stays.

    Raises:
        GraphSetError: they do not have the same form.
    """
    if isinstance(output, list | tuple):
        if len(output) != len(home):
            raise _other_form(f"{len(output)} outputs", f"{len(home)}")
        return type(output)(land(new, old) for new, old in zip(output, home, strict=True))
    if not hasattr(output, "copy_"):
        return output
    if output.shape != home.shape:
        raise _other_form(f"an output of shape {list(output.shape)}", f"{list(home.shape)}")
    if output.data_ptr() != home.data_ptr():
        home.copy_(output)
    return home


def _other_form(now: str, at_home: str) -> GraphSetError:
    return GraphSetError(
        f"a piece has {now}, in the first graph set it had {at_home}; capture all graph sets from one compiled model"
    )
