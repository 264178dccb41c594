"""CUDA graphs by the formats they were captured at.

A graph keeps the kernels and the addresses of the formats that the layers had at its capture; replayed at others, it
computes with weights that are not there. vLLM keeps graphs in dictionaries of the objects that replay them. A
*bank* is one set of such dictionaries, and a switch of formats shows another bank by storing references, no more.

A graph of one piece of the model (between two attentions: the end of layer p and the beginning of p + 1) depends on
the formats of those layers only, so levels share it wherever they agree on them, and formats between two levels have
it too; landing.py says what that takes. A graph of a whole step needs its very own formats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from morphserve.residence.errors import GraphBankError
from morphserve.residence.graphs.routes import Offer, Route
from morphserve.residence.graphs.shelves import Entries, Formats, Holder, Shelf, Watch

logger = logging.getLogger("vllm.morphserve")


class GraphBanks:
    """All graphs of one rank, of which those of the present formats can be found.

    1. A graph can be found only at the formats it was captured at: for a piece, those of its layers.
    2. Nothing is captured but between `begin` and `end`. What the present bank lacks is not chosen from vLLM's tables
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
        """Changes nothing yet. For objects that stay: vLLM makes some of them anew after it has profiled memory.

        Args:
            holders: everything that keeps graphs of the morphing model. Those of a draft model stay out.
            routes: the tables that vLLM chooses descriptors from, as they are when everything is captured.
            later_pool: a graph memory pool (torch.cuda.graph_pool_handle()) for the pieces of all banks but the first.
                Under sleep mode vLLM captures into a pool of its own choice: that and pieces do not go together.
            watch: tells holders that learn their scope which layers run. Without it they share nothing.

        Raises:
            GraphBankError: there are pieces and no second pool.
        """
        learn = watch is not None and any(holder.learns for holder in holders)
        if later_pool is None and (learn or any(holder.is_piece for holder in holders)):
            raise GraphBankError(
                "pieces share graphs between levels, and there is one graph memory pool; they need two, or a later "
                "capture would overwrite what lies between pieces. Pass later_pool, or holders without a scope"
            )
        self._shelves = [Shelf(holder) for holder in holders]
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
        """Whether whole steps were captured at these formats: then there is nothing to capture for them."""
        return bool(self._offer(self._at(formats)).full)

    def num_graphs(self) -> dict[Formats, int]:
        """How many graphs the capture of each bank has added; what it shares with earlier ones is counted there."""
        return dict(self._num_graphs)

    def begin(self, formats: Formats) -> None:
        """Make room for the graphs of these formats: when the layers have them, before vLLM captures.

        The first bank is level 0's and must get every size that a later one gets.

        Raises:
            GraphBankError: another capture has not ended, or this bank exists.
        """
        self._refuse_while_capturing()
        if formats in self._num_graphs or self.has_full(formats):
            raise GraphBankError(f"graphs of {formats} exist; each bank is captured once: switch to it, or clear all")
        self._capturing = self._live = formats
        for shelf in self._shelves:
            shelf.open(formats, self._later_pool, self._watch)
        self._route(self._whole)

    def end(self) -> bool:
        """Take what was captured, after a capture that failed half way too. Returns what `switch` does.

        Raises:
            GraphBankError: no capture was begun.
        """
        if self._capturing is None:
            raise GraphBankError("no bank is being captured; call begin first")
        formats, self._capturing = self._capturing, None
        num_dropped = sum(shelf.close(self._keys) for shelf in self._shelves)
        if not self._num_graphs:
            self._learn(formats)
        if num_dropped:
            logger.warning(
                "morphserve: %d CUDA graphs do not read where level 0's do and were dropped; their steps run eagerly",
                num_dropped,
            )
        num_all = sum(len(entries) for shelf in self._shelves for entries in shelf.by_formats.values())
        self._num_graphs[formats] = num_all - sum(self._num_graphs.values())
        # Narrowing a table takes a millisecond: done here for what switches will meet, with and without full graphs.
        offer = self._offer(self._at(formats))
        for likely in (offer, Offer(piecewise=offer.piecewise), Offer()):
            self._narrowed(likely)
        return self.switch(formats)

    def switch(self, formats: Formats) -> bool:
        """Show the graphs of these formats and no others. Returns whether whole steps have one.

        Raises:
            GraphBankError: a capture has not ended.
        """
        self._refuse_while_capturing()
        shown = self._at(formats)
        offer = self._offer(shown)
        tables = self._narrowed(offer)
        for shelf, entries in zip(self._shelves, shown, strict=True):
            shelf.show(entries)
        self._route(tables)
        self._live = formats
        return bool(offer.full)

    def clear(self) -> None:
        """Drop all banks, one that is being captured too. Steps run eagerly until another is captured."""
        for shelf in self._shelves:
            if shelf.opened is not None:
                shelf.close(self._keys)
            shelf.clear(self._closed)
        self._num_graphs.clear()
        self._tables.clear()
        self._capturing = self._live = None
        self._route(self._narrowed(Offer()))

    def _learn(self, formats: Formats) -> None:
        """After the first bank: give every holder that learns its scope, or none if they have not seen every layer."""
        found = [(shelf, shelf.take_seen()) for shelf in self._shelves if shelf.given.learns]
        unseen = set(range(len(formats))).difference(*(seen for _, seen in found))
        if not found or self._watch is None:
            return
        if unseen:  # some linear ran past the watch: a piece might depend on it
            logger.warning(
                "morphserve: no piece of the model was seen to use layers %s; each level captures all of its pieces",
                sorted(unseen),
            )
            return
        for shelf, seen in found:
            shelf.limit(seen, formats)

    def _refuse_while_capturing(self) -> None:
        if self._capturing is not None:
            raise GraphBankError(f"a bank is being captured, at {self._capturing}; one at a time: call end first")

    def _at(self, formats: Formats) -> list[Entries]:
        """Each holder's dictionary at these formats."""
        return [shelf.by_formats.get(shelf.holder.part(formats), self._closed) for shelf in self._shelves]

    def _offer(self, shown: Sequence[Entries]) -> Offer:
        """Descriptors that all holders of a kind have."""
        # A wrapper that level 0's capture never reached is of another model, and says nothing about this one.
        pairs = [(s, entries) for s, entries in zip(self._shelves, shown, strict=True) if s.is_full or s.home]
        return Offer(
            _common(entries.keys_at_close for shelf, entries in pairs if shelf.is_full),
            _common(entries.keys_at_close for shelf, entries in pairs if not shelf.is_full),
        )

    def _narrowed(self, offer: Offer) -> tuple[Any, ...]:
        """Each route's table for this offer; vLLM's own where nothing is missing."""
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
    distinct = set(keys)  # mostly one: pieces have all sizes, or none
    return frozenset.intersection(*distinct) if len(distinct) > 1 else next(iter(distinct), frozenset())
