"""What is in doubt when a rank says no to a command that cannot fail, and whether throwing the KV away ends it."""

from __future__ import annotations

from dataclasses import dataclass

from morphserve.control.budget import Ledgers
from morphserve.control.ranks import BlockPoolPort, RanksUnknown, Reply, ReplyTracker, failures
from morphserve.control.transition import BatchEnd


@dataclass(slots=True)
class Doubt:
    """The judge of such answers, by what ranks say of themselves: bytes of weights, and blocks that are mapped.

    Doubt about the KV alone is ended here: nobody reads it again. Doubt about weights or mapped blocks cannot be.
    """

    pool: BlockPoolPort
    ledgers: Ledgers
    replies: ReplyTracker

    def discard_kv(self, replies: tuple[Reply, ...]) -> str:
        """Let all be computed again, as a rank may have copied half or renamed half of its tables. Return why.

        Raises:
            RanksUnknown: weights or mapped blocks are in doubt too, or somebody holds on to a block.
        """
        failed = failures(replies)
        if not self.is_sound(replies):
            raise RanksUnknown(failed)
        try:
            self.pool.discard_contents()
        except Exception as e:
            raise RanksUnknown(f"{failed}; and its KV cannot be discarded ({type(e).__name__}: {e})") from e
        self.replies.drop_copies()
        return f"{failed}; what was in the KV cache is computed again"

    def end_of(self, replies: tuple[Reply, ...]) -> BatchEnd:
        """Return the end of a swap batch with which a rank has failed before it changed a layer.

        What all have moved whole is kept.

        Raises:
            RanksUnknown: as `discard_kv`.
        """
        if not all(reply.kv_moved for reply in replies):
            return kv_was_unknown(self.discard_kv(replies))
        if not self.is_sound(replies):
            raise RanksUnknown(failures(replies))
        return BatchEnd("aborted", error=failures(replies))

    def is_sound(self, replies: tuple[Reply, ...]) -> bool:
        """Return whether by their own words all have the weights that they had, and what is published mapped.

        Against each rank's own last word, where there is one: what the ledger counts may be a bound.
        """
        before, published = self.replies.before, self.pool.num_kv_blocks
        return all(
            reply.num_kv_blocks >= published
            and reply.weight_bytes
            == (before[reply.rank].weight_bytes if reply.rank in before else self.ledgers[reply.rank]["weights"])
            for reply in replies
        )


def kv_was_unknown(error: str) -> BatchEnd:
    """Return the end of a swap batch whose blocks were thrown away."""
    return BatchEnd("aborted", error=error, place="kv_unknown")
