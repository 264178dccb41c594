"""`python -m morphserve` is the command `morphserve`."""

from __future__ import annotations

from morphserve.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
