"""Which layers should be swapped first, into what?

A door of `morphserve profile`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
