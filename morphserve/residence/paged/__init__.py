"""Layers and KV in pages of device memory, copied beside the forward passes."""
