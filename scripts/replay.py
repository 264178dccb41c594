"""How does a burst of real traffic fare on stock vLLM, and on MorphServe?

A door of `morphserve replay`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["replay", *sys.argv[1:]]))
