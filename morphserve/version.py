"""The facts about versions that everything else reads: ours, and which vLLM we were tested with."""

__version__ = "0.1.0"

# The one statement of the supported range. The seam check, the README and the packaging tests read it.
SUPPORTED_VLLM = ">=0.32,<0.34"

# A GPU's name, versions of vLLM and torch: where what `morphserve gpu-check` tries has passed, on one GPU.
PROVEN_GPUS = (("NVIDIA H100 80GB HBM3", "0.33", "2.11"), ("NVIDIA H200", "0.33", "2.11"))
# With this set to 1, MorphServe starts on any other.
UNPROVEN_CUDA = "MORPHSERVE_UNPROVEN_CUDA"
# With this set to 1, MorphServe starts on a vLLM outside of the range that has all it touches.
UNPROVEN_VLLM = "MORPHSERVE_UNPROVEN_VLLM"
