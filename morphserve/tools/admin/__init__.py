"""Orders to a running server, a command each: pin, restore, pause, resume, drain."""

from __future__ import annotations

from morphserve.tools.admin.client import NotOrdered, order_state, send_order

__all__ = ["NotOrdered", "order_state", "send_order"]
