"""How long does an engine step take, at every level?

A door of `morphserve calibrate`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
