"""Does anything add up in hours of morphing, and is every answer right?

A door of `morphserve soak`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["soak", *sys.argv[1:]]))
