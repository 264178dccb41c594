"""`python -m morphserve inspect PROFILE`: a profile as tables."""

from __future__ import annotations

from collections import Counter

from morphserve.tools.tables import text_table
from quant_layers import Profile


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
