"""Checkpoints in 4 bits with calibration, made by llm-compressor in an environment of its own.

`cli` is the command, on our side of it; `compress` runs on the other side, where nothing of ours is installed.
"""
