"""Where is a real model that this machine can serve without an account or a GPU?

A door of `morphserve demo --get-model`.

    .venv/bin/python scripts/demo_model.py            # sizes are checked on every call
    .venv/bin/python scripts/demo_model.py --verify   # full hashes

The last stdout line is the directory.
"""

from __future__ import annotations

import sys

from morphserve.commands import main

if __name__ == "__main__":
    sys.exit(main(["demo", "--get-model", *sys.argv[1:]]))
