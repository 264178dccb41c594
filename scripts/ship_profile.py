"""Take a profile that `morphserve prepare MODEL` made into the package, without what depends on a machine.

Servers of MODEL then find it without a preparation of their own. Step times stay behind: factors in the ladder are left
out, calibrations are not taken. An earlier one of the model is replaced.

Last stdout line: one JSON document {"shipped", "bytes"}.

    morphserve prepare MODEL --without-times
    python scripts/ship_profile.py MODEL
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from morphserve.cache import cache_root
from morphserve.tools.command import command_parser, fail, finish


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("model", type=Path, help="directory")
    parser.add_argument("--cache-dir", type=Path, default=cache_root())
    args = parser.parse_args(argv)
    from morphserve.prepared import SHIPPED, Store, weights_fingerprint
    from quant_layers import read_profile, write_profile

    weights = weights_fingerprint(args.model) or ""
    store = Store(args.cache_dir, weights, shipped=Path("/nowhere"))
    found = store.profiles()
    if len(found) != 1:
        return fail("ship_profile", ValueError(f"{store.directory} has {len(found)} profiles, one is to be shipped."))
    profile = read_profile(found[0].directory)
    target = SHIPPED / store.directory.name / found[0].directory.name
    shutil.rmtree(target.parent, ignore_errors=True)
    ladder = [replace(level, step_time_factor=None) for level in profile.ladder]
    figures = {key: value for key, value in profile.figures.items() if key != "seconds"}
    write_profile(target, profile.fingerprint, profile.scales, ladder, profile.order, profile.made, figures)
    return finish({"shipped": str(target), "bytes": sum(file.stat().st_size for file in target.iterdir())})


if __name__ == "__main__":
    raise SystemExit(main())
