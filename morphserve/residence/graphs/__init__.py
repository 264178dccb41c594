"""CUDA graphs for every level, in one pool of memory."""
