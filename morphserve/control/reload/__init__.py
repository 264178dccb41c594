"""Another policy while the server runs: a thread reads and checks it, the controller asks it from its next tick on."""

from __future__ import annotations

from morphserve.control.reload.reloader import PolicyReloader, Reloads
from morphserve.control.reload.watch import ReloadWatch

__all__ = ["PolicyReloader", "ReloadWatch", "Reloads"]
