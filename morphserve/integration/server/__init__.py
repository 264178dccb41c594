"""The API-server process: metrics, the status and its page, reload, and the limit of its queue."""

from __future__ import annotations

from morphserve.integration.server.receipt_door import forget_forged_marks, keep_all_receipts

__all__ = ["forget_forged_marks", "keep_all_receipts"]
