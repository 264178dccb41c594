"""Which policy suits my traffic?

A door of `morphserve tune`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
