"""How little could a workload have cost? Levels by time, searched for by who knows what will come."""

from __future__ import annotations

from morphserve.tools.clairvoyant.frontier import Frontier, Point
from morphserve.tools.clairvoyant.report import Findings, find, text_of
from morphserve.tools.clairvoyant.search import SearchOptions, search
from morphserve.tools.clairvoyant.world import World

__all__ = ["Findings", "Frontier", "Point", "SearchOptions", "World", "find", "search", "text_of"]
