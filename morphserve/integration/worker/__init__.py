"""A rank's process: its layers, its KV cache, and the commands that change them between two steps."""
