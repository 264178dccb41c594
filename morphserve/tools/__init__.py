"""Measuring from outside; nothing that serves imports it."""
