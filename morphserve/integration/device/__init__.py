"""The door between vLLM and `morphserve.device`: layers and KV cache on a GPU, or on fake pages in tests."""
