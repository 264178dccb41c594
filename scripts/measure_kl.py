"""What does a format cost?

A door of `morphserve measure-kl`: --help has its options, columns and an example.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["measure-kl", *sys.argv[1:]]))
