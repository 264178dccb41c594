"""CUDA graphs of every level, and what else a rank on a GPU does at start."""
