"""What MorphServe needs of a machine with an NVIDIA GPU, measured part by part: see docs/gpu.md.

The frame (cli, frame, results, machine, tables) loads neither torch nor vLLM: a part that crashes the driver, hangs or
runs out of memory does so in a process of its own, and what the other parts found is on disk already. `parts` has T1 to
T11 by what they try, `mini` the small models that they try it on.
"""

from morphserve.tools.gpucheck.cli import main

__all__ = ["main"]
