"""CUDA graphs by the formats they were captured at.

A graph keeps the kernels and the addresses of the formats that the layers had at its capture; replayed at others, it
computes with weights that are not there. vLLM keeps graphs in dictionaries of the objects that replay them. A
*graph set* is one set of such dictionaries, and a switch of formats shows another by storing references, no more.

A graph of one piece of the model (between two attentions: the end of layer p and the beginning of p + 1) depends on
the formats of those layers only, so levels share it wherever they agree on them, and formats between two levels have
it too; output_alias.py says what that takes. A graph of a whole step needs its very own formats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from morphserve.residence.errors import GraphSetError
from morphserve.residence.graphs.caches import Entries, Formats, GraphCache, Holder, Watch
from morphserve.residence.graphs.routes import Offer, Route

logger = logging.getLogger("vllm.morphserve")


class GraphSets:
    """All graphs of one rank, of which those of the present formats can be found.

    1. A graph can be found only at the formats it was captured at: for a piece, those of its layers.
    2. Nothing is captured but between `begin` and `end`. What the present set lacks is not chosen from vLLM's tables
       (`routes`), and would be refused: the step takes PIECEWISE of the same formats, else it runs eagerly.
    3. `switch` stores attributes and cannot fail; at the same formats it always shows the same dictionaries.

    Call `switch` where the layers switch: between two steps, on their thread. Whoever clears vLLM's graphs must call
    `clear` here, or the tables would go on offering them.
    """

    def __init__(
        self,
        holders: Sequence[Holder],
        routes: Sequence[Route] = (),
        later_pool: Any = None,
        watch: Watch | None = None,
    ) -> None:
        """Change nothing yet. For objects that stay: vLLM makes some of them anew after it has profiled memory.

        Args:
            holders: everything that keeps graphs of the morphing model. Those of a draft model stay out.
            routes: the tables that vLLM chooses descriptors from, as they are when everything is captured.
            later_pool: a graph memory pool (torch.cuda.graph_pool_handle()) for the pieces of all sets but the first.
                Under sleep mode vLLM captures into a pool of its own choice: that and pieces do not go together.
            watch: tells holders that learn their scope which layers run. Without it they share nothing.

        Raises:
            GraphSetError: there are pieces and no second pool.
        """
        learn = watch is not None and any(holder.learns for holder in holders)
        if later_pool is None and (learn or any(holder.is_piece for holder in holders)):
            raise GraphSetError(
                "pieces share graphs between levels, and there is one graph memory pool; they need two, or a later "
                "capture would overwrite what lies between pieces. Pass later_pool, or holders without a scope"
            )
        self._caches = [GraphCache(holder) for holder in holders]
        self._watch = watch
        self._routes = tuple(routes)
        self._whole = tuple(getattr(route.owner, route.attribute) for route in routes)
        self._tables: dict[Offer, tuple[Any, ...]] = {}
        self._later_pool = later_pool
        self._closed = Entries()
        self._keys: dict[frozenset[Any], frozenset[Any]] = {}
        self._num_graphs: dict[Formats, int] = {}
        self._capturing: Formats | None = None
        self._live: Formats | None = None

    @property
    def live(self) -> Formats | None:
        """Formats whose graphs can be found now. None: no graph can."""
        return self._live

    def has_full(self, formats: Formats) -> bool:
        """Return whether whole steps were captured at these formats: then there is nothing to capture for them."""
        return bool(self._offer(self._at(formats)).full)

    def lacks_pieces(self, formats: Formats) -> bool:
        """Return whether a capture at these formats would give graphs to pieces that have none there.

        False where something else than pieces has to be captured with them, anew for each combination of formats.
        """
        parts = [cache for cache in self._caches if not cache.is_full and cache.home is not None]
        if not all(cache.holder.is_piece for cache in parts):
            return False
        return any(cache.holder.part(formats) not in cache.by_formats for cache in parts)

    def num_graphs(self) -> dict[Formats, int]:
        """Return how many graphs the capture of each set has added; what it shares counts with the earlier ones."""
        return dict(self._num_graphs)

    def begin(self, formats: Formats) -> None:
        """Make room for the graphs of these formats: when the layers have them, before vLLM captures.

        The first graph set is level 0's and must get every size that a later one gets.

        Raises:
            GraphSetError: another capture has not ended, or this graph set exists.
        """
        self._refuse_while_capturing()
        if formats in self._num_graphs or self.has_full(formats):
            raise GraphSetError(f"graphs of {formats} exist; each set is captured once: switch to it, or clear all")
        self._capturing = self._live = formats
        for cache in self._caches:
            cache.open(formats, self._later_pool, self._watch)
        self._route(self._whole)

    def end(self) -> bool:
        """Take what was captured, after a capture that failed half way too. Returns what `switch` does.

        Raises:
            GraphSetError: no capture was begun.
        """
        if self._capturing is None:
            raise GraphSetError("no graph set is being captured; call begin first")
        formats, self._capturing = self._capturing, None
        num_dropped = sum(cache.close(self._keys) for cache in self._caches)
        if not self._num_graphs:
            self._learn(formats)
        if num_dropped:
            logger.warning(
                "morphserve: %d CUDA graphs do not read where level 0's do and were dropped; their steps run eagerly",
                num_dropped,
            )
        num_all = sum(len(entries) for cache in self._caches for entries in cache.by_formats.values())
        self._num_graphs[formats] = num_all - sum(self._num_graphs.values())
        # Narrowing a table takes a millisecond: done here for what switches will meet, with and without full graphs.
        offer = self._offer(self._at(formats))
        for likely in (offer, Offer(piecewise=offer.piecewise), Offer()):
            self._narrowed(likely)
        return self.switch(formats)

    def switch(self, formats: Formats) -> bool:
        """Show the graphs of these formats and no others. Returns whether whole steps have one.

        Raises:
            GraphSetError: a capture has not ended.
        """
        self._refuse_while_capturing()
        shown = self._at(formats)
        offer = self._offer(shown)
        tables = self._narrowed(offer)
        for cache, entries in zip(self._caches, shown, strict=True):
            cache.show(entries)
        self._route(tables)
        self._live = formats
        return bool(offer.full)

    def clear(self) -> None:
        """Drop all graph sets, one that is being captured too. Steps run eagerly until another is captured."""
        for cache in self._caches:
            if cache.opened is not None:
                cache.close(self._keys)
            cache.clear(self._closed)
        self._num_graphs.clear()
        self._tables.clear()
        self._capturing = self._live = None
        self._route(self._narrowed(Offer()))

    def _learn(self, formats: Formats) -> None:
        """Give every holder that learns its scope, after the first set; none if they have not seen every layer."""
        found = [(cache, cache.take_seen()) for cache in self._caches if cache.given.learns]
        unseen = set(range(len(formats))).difference(*(seen for _, seen in found))
        if not found or self._watch is None:
            return
        if unseen:  # some linear ran past the watch: a piece might depend on it
            logger.warning(
                "morphserve: no piece of the model was seen to use layers %s; each level captures all of its pieces",
                sorted(unseen),
            )
            return
        for cache, seen in found:
            cache.limit(seen, formats)

    def _refuse_while_capturing(self) -> None:
        if self._capturing is not None:
            raise GraphSetError(f"a graph set is being captured, at {self._capturing}; one at a time: call end first")

    def _at(self, formats: Formats) -> list[Entries]:
        """Return each holder's dictionary at these formats."""
        return [cache.by_formats.get(cache.holder.part(formats), self._closed) for cache in self._caches]

    def _offer(self, shown: Sequence[Entries]) -> Offer:
        """Descriptors that all holders of a kind have."""
        # A wrapper that level 0's capture never reached is of another model, and says nothing about this one.
        pairs = [(s, entries) for s, entries in zip(self._caches, shown, strict=True) if s.is_full or s.home]
        return Offer(
            _common(entries.keys_at_close for cache, entries in pairs if cache.is_full),
            _common(entries.keys_at_close for cache, entries in pairs if not cache.is_full),
        )

    def _narrowed(self, offer: Offer) -> tuple[Any, ...]:
        """Return each route's table for this offer; vLLM's own where nothing is missing."""
        if offer not in self._tables:
            narrowed = []
            for route, whole in zip(self._routes, self._whole, strict=True):
                table = route.narrow(whole, offer)
                narrowed.append(whole if table == whole else table)
            self._tables[offer] = tuple(narrowed)
        return self._tables[offer]

    def _route(self, tables: Sequence[Any]) -> None:
        for route, table in zip(self._routes, tables, strict=True):
            setattr(route.owner, route.attribute, table)


def _common(keys: Iterable[frozenset[Any]]) -> frozenset[Any]:
    distinct = set(keys)  # few: pieces have all sizes, those of a level, those between levels, or none
    return frozenset.intersection(*distinct) if len(distinct) > 1 else next(iter(distinct), frozenset())
