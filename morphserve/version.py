"""The two facts about versions that everything else reads: ours, and which vLLM we were tested with."""

__version__ = "0.1.0"

# The one statement of the supported range. The seam check, the README and the packaging tests read it.
SUPPORTED_VLLM = ">=0.32,<0.33"
