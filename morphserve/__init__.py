"""A plugin for stock vLLM that swaps decoder layers for quantized ones under load."""
