"""How do I get a better W4?

A door of `morphserve quantize`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
