"""A rank's process: its layers, its KV cache, and the commands that change them between two steps."""

from morphserve.integration.worker.kv import check_kinds, geometry_of, granularity_of
from morphserve.integration.worker.refusals import check_weight_access, keeps_weights

__all__ = ["check_kinds", "check_weight_access", "geometry_of", "granularity_of", "keeps_weights"]
