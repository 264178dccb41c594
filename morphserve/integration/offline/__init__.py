"""Engines that serve nobody: to measure, to check, to smoke-test."""

from __future__ import annotations

from morphserve.integration.offline.level_engine import LevelEngine

__all__ = ["LevelEngine"]
