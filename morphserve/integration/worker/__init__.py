"""A rank's process: its layers, its KV cache, and the commands that change them between two steps."""

from morphserve.integration.worker.kv import check_kinds, geometry_of, granularity_of

__all__ = ["check_kinds", "geometry_of", "granularity_of"]
