"""Packed layers on disk."""
