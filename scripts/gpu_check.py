"""What of MorphServe's NVIDIA path holds on this machine?

A door of `morphserve gpu-check`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["gpu-check", *sys.argv[1:]]))
