"""The API-server process: metrics, the status and its page, reload, and the limit of its queue."""

from __future__ import annotations

from morphserve.integration.server.receipt_door import keep_all_receipts

__all__ = ["keep_all_receipts"]
