"""The facts about versions that everything else reads: ours, and which vLLM we were tested with."""

__version__ = "0.1.0"

# The one statement of the supported range. The seam check, the README and the packaging tests read it.
SUPPORTED_VLLM = ">=0.32,<0.33"

# With this set to 1, MorphServe starts on CUDA, and with the vLLM whose sources hold all it needs but which never ran.
# Goes when `morphserve gpu-check` has passed on a GPU.
UNPROVEN_CUDA = "MORPHSERVE_UNPROVEN_CUDA"
UNPROVEN_VLLM = ">=0.32,<0.34"
