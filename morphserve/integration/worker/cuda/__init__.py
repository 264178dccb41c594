"""A rank on a GPU, whose layers and KV share pages."""
