"""What is in a profile? How it was made, its ladder level by level, what single layers cost.

Columns of the ladder: level, layers by format, those that have changed since the level before, expected and measured KL
(nats per token), MiB freed, step time over level 0. With --json one document {"profile", "base", "made", "order",
"ladder": [{"level", "expected_kl", "measured_kl", "bytes_freed", "step_time_factor", "layers"}]} instead.

    morphserve inspect profiles/smollm2
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from morphserve.tools.command import command_parser, fail, finish
from morphserve.tools.tables import text_table
from quant_layers import Profile, ProfileError, read_profile


def main(argv: Sequence[str] | None = None, prog: str = "morphserve inspect") -> int:
    """Print a profile; returns the exit status."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("profile", help="directory that `morphserve profile` made")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    try:
        profile = read_profile(args.profile)
    except ProfileError as error:
        return fail(prog, error)
    if args.json:
        return finish(document(profile))
    sys.stdout.write(describe(profile))
    return 0


def document(profile: Profile) -> dict[str, object]:
    """Return the same for a program."""
    return {
        "profile": str(profile.directory),
        "base": profile.fingerprint,
        "made": dict(profile.made),
        "order": list(profile.order),
        "ladder": [level.as_json(index) for index, level in enumerate(profile.ladder)],
    }


def describe(profile: Profile) -> str:
    """Say what it is, its ladder level by level, and what single layers cost."""
    made = ", ".join(f"{key} {_short(value)}" for key, value in profile.made.items())
    parts = [
        f"{profile.directory}\nbase {profile.fingerprint[:16]}, {profile.num_layers} layers\nmade with {made}",
        f"order, least harmful first: {' '.join(map(str, profile.order))}",
        "levels\n" + ladder_table(profile),
    ]
    layers = profile.figures.get("layers")
    if layers:
        parts.append("layers alone (KL in nats per token; LTS and LRS: paper, Algorithm 1)\n" + _layer_table(layers))
    return "\n\n".join(parts) + "\n"


def ladder_table(profile: Profile) -> str:
    """Level by level: which layers have changed since the one before, and what is known of it."""
    head = ("level", "layers", "changed", "KL expected", "KL measured", "MiB freed", "step time")
    rows = []
    before: dict[int, str] = {}
    for index, level in enumerate(profile.ladder):
        counts = Counter(level.layers.values())
        changed = [f"{layer}:{fmt}" for layer, fmt in sorted(level.layers.items()) if before.get(layer) != fmt]
        rows.append(
            [
                str(index),
                " ".join(f"{fmt} {count}" for fmt, count in counts.items()) or "base",
                " ".join(changed) or "-",
                f"{level.expected_kl:.4f}",
                "-" if level.measured_kl is None else f"{level.measured_kl:.4f}",
                f"{level.bytes_freed / 2**20:.1f}",
                "-" if level.step_time_factor is None else f"{level.step_time_factor:.2f}x",
            ]
        )
        before = dict(level.layers)
    return "\n".join(text_table(head, rows))


def _layer_table(layers: dict[str, dict[str, object]]) -> str:
    formats = list(next(iter(layers.values()))["kl"])  # type: ignore[call-overload]
    head = ("layer", *(f"KL {fmt}" for fmt in formats), "LTS", *(f"LRS {fmt}" for fmt in formats))
    rows = []
    for layer, row in layers.items():
        kl, lrs = row["kl"], row["lrs"]
        assert isinstance(kl, dict) and isinstance(lrs, dict)
        rows.append(
            [layer, *(f"{kl[fmt]:.5f}" for fmt in formats), f"{row['lts']:.3f}", *(f"{lrs[f]:.4f}" for f in formats)]
        )
    return "\n".join(text_table(head, rows))


def _short(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
