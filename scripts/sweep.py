"""How do several policies fare on several windows?

A door of `morphserve sweep`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
