"""What an API server answers under `/morphserve`: status, page, reloads, an operator's orders; and who may ask."""

from __future__ import annotations

from morphserve.integration.server.routes.access import Access
from morphserve.integration.server.routes.admin_api import add_admin
from morphserve.integration.server.routes.page import add_page
from morphserve.integration.server.routes.reload_api import Sameness, add_reload, on_hangup, reload_engines
from morphserve.integration.server.routes.shortcut import Shortcut
from morphserve.integration.server.routes.status_api import LastStatuses, add_status

__all__ = [
    "Access",
    "LastStatuses",
    "Sameness",
    "Shortcut",
    "add_admin",
    "add_page",
    "add_reload",
    "add_status",
    "on_hangup",
    "reload_engines",
]
