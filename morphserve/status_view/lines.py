"""The lines of an engine: each reads what it needs of the status, and says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from morphserve.status_view.parts import Line, Tone
from morphserve.status_view.words import counts, duration, percent

Status = Mapping[str, Any]

_OLD_S = 2.0  # engines are asked twice a second, and their figures are as old as their last answer
_FEW_LATE = 0.01  # of the last requests; more of them are bad, not only worth a look


def _level(s: Status) -> Line:
    level, target = s["exposure_level"], s["target_level"]
    goal = "there" if target == level else f"to {target}"
    phase = "" if s["phase"] == "idle" else f" ({s['phase']})"  # idle: between two swap batches
    way = f", on the way {goal}{phase}" if is_moving(s) else ""
    return Line("Level", f"{level} of {s['deepest_level']}{way}", s["reason"], "warn" if level else "good")


def silent_s(s: Status) -> float:
    """Return for how long the engine has not answered, 0 while it does."""
    age_s: float = s.get("age_s", 0.0)  # of a server that does not tell, figures are of now
    return age_s if age_s > _OLD_S else 0.0


def _silence(s: Status) -> Line | None:
    if not (age_s := silent_s(s)):
        return None
    return Line("Engine", f"no answer; the figures are {duration(age_s)} old", "it hangs, or is in a long step", "bad")


def is_moving(s: Status) -> bool:
    """Return whether layers or blocks are between two levels."""
    return not s["level"] == s["target_level"] == s["exposure_level"]


def _layers(s: Status) -> Line:
    return Line("Layers", counts(s["layers_by_format"]))


def _requests(s: Status) -> Line:
    oldest = f", the oldest for {s['oldest_wait_s']:.1f} s" if s["num_waiting"] else ""
    return Line("Requests", f"{s['num_running']:,} running, {s['num_waiting']:,} waiting{oldest}")


def _late(s: Status) -> Line:
    late, recent = s["late"], s["late"]["recent"]
    limits = [f"first token after {late['ttft_s']:g} s"] if late["ttft_s"] is not None else []
    limits += [f"over {1e3 * late['tpot_s']:g} ms per token"] if late["tpot_s"] is not None else []
    note = f"{' or '.join(limits) or 'limits of their own'}; by the engine's clock, without the way to the client"
    if not late["num_judged"]:
        nobody = "no request has ended" if limits else f"nothing is promised by policy {s['policy']['kind']}"
        return Line("Late", nobody, note if limits else "")
    share = percent(late["num_late"], late["num_judged"])
    text = f"{late['num_late']:,} of {late['num_judged']:,} ({share})"
    tone: Tone = ""
    if recent["num_late"]:
        tone = "bad" if recent["num_late"] > _FEW_LATE * recent["num_judged"] else "warn"
    lately = f"; lately {recent['num_late']:,} of {recent['num_judged']:,}" if recent["num_judged"] else ""
    return Line("Late", text + lately, note, tone)


def _quality(s: Status) -> Line:
    quality = s["quality"]
    if not quality["tokens"]:
        return Line("Quality", "no token yet")
    degraded = f"{percent(quality['degraded_tokens'], quality['tokens'])} of {quality['tokens']:,} tokens degraded"
    kl = quality["expected_kl_per_token"]
    text = degraded if kl is None else f"{kl:.4f} nats per token expected, {degraded}"
    if quality["unpriced_tokens"]:
        note = f"{quality['unpriced_tokens']:,} tokens come from levels whose cost nobody has measured"
        return Line("Quality", text, note, "warn")
    return Line("Quality", text, "KL to full precision, as measured for each level")


def _tokens(s: Status) -> Line:
    some = {f"at level {level}": tokens for level, tokens in s["tokens_by_level"].items() if tokens}
    return Line("Tokens", counts(some) or "none yet")


def _pauses(s: Status) -> Line:
    pauses = s["pause_ms"]
    if pauses["max"] is None:
        return Line("Pauses", "none yet")
    typical = "" if pauses["p50"] is None else f"{pauses['p50']:.0f} ms median, "
    return Line("Pauses", f"{typical}{pauses['max']:.0f} ms longest", "of a command, between two steps")


def _transitions(s: Status) -> Line:
    done = {key.replace("_", " "): count for key, count in s["transitions"].items()}
    if not done:
        return Line("Transitions", "none yet")
    tone: Tone = "warn" if any("aborted" in key for key in done) else ""
    return Line("Transitions", counts(done), f"{s['transition_seconds']:.1f} s altogether", tone)


def _policy(s: Status) -> Line:
    policy, predictions = s["policy"], s.get("predictions")
    text = policy["kind"] if predictions is None else f"{policy['kind']}, predictions {predictions}"
    if policy["last_error"]:
        return Line("Policy", text, f"the last edit was refused: {policy['last_error']}", "bad")
    times = f", reloaded {policy['reloads']:,} times" if policy["reloads"] else ""
    return Line("Policy", text, f"from {policy['source']}{times}")


def _order(s: Status) -> Line | None:
    order = s["orders"]["order"] if "orders" in s else None  # an older server has none
    if order is None:
        return None
    what = f"{order['kind']} level {order['level']}" if order["kind"] in ("pin", "max") else order["kind"]
    left = "until `morphserve resume`" if order["left_s"] is None else f"for {order['left_s']:.0f} s more"
    return Line("Order", f"{what}, {left}", order.get("cause", ""), "warn")


def _holds(s: Status) -> Line | None:
    used = {name: hold for name, hold in s.get("holds", {}).items() if hold["left_s"] < hold["per_hour_s"]}
    if not used:
        return None
    spent = [name for name, hold in used.items() if hold["is_spent"]]
    text = ", ".join(f"{name} {hold['left_s']:.0f} s of {hold['per_hour_s']:g} an hour" for name, hold in used.items())
    note = f"spent: {' and '.join(spent)} count for nothing until a tenth is back" if spent else "left to hold others"
    return Line("Holds", text, note, "warn" if spent else "")


def _prepare(s: Status) -> Line | None:
    prepare = s.get("prepare")
    if prepare is None:
        return None
    wait = prepare["begins_in_s"]
    more = prepare["part"] or ("" if wait is None else f"in {duration(wait)} without a request")
    tone: Tone = "warn" if prepare["state"] in ("failed", "off") else ""
    return Line("Prepare", ", ".join(part for part in (prepare["state"], more) if part), prepare["note"], tone)


def _refusing(s: Status) -> Line | None:
    limit, floor = s["max_queued_tokens"], s.get("min_floor")  # servers before this one have none
    parts = [] if limit is None else [f"requests beyond {limit:,} queued tokens"]
    parts += [f"requests that may not be served at level {floor}"] if floor else []
    return Line("Door", f"refuses {' and '.join(parts)}", tone="bad") if parts else None


def _errors(s: Status) -> Line:
    if s["failed"]:
        what = f"MorphServe gave up, the engine stays at level {s['level']}: restart the server"
        return Line("Errors", counts(s["errors"]), what, "bad")
    return Line("Errors", counts(s["errors"]), tone="warn") if s["errors"] else Line("Errors", "none")


LINES: tuple[tuple[str, Callable[[Status], Line | None]], ...] = (
    ("Engine", _silence),
    ("Level", _level),
    ("Requests", _requests),
    ("Late", _late),
    ("Quality", _quality),
    ("Tokens", _tokens),
    ("Layers", _layers),
    ("Pauses", _pauses),
    ("Transitions", _transitions),
    ("Policy", _policy),
    ("Order", _order),
    ("Holds", _holds),
    ("Prepare", _prepare),
    ("Door", _refusing),
    ("Errors", _errors),
)
