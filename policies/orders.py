"""What an operator orders is an input of the decision: the policy answers, and the answer keeps to the order."""

from __future__ import annotations

from policies.types import Decision, Order, Policy, Signals


def ask(policy: Policy, signals: Signals) -> Decision:
    """Ask the policy, and hold its answer to the order in force.

    The policy is asked under an order, too, so that it knows the engine when it decides again.
    """
    return obey(policy.decide(signals), signals.order, policy.max_level)


def obey(decision: Decision, order: Order | None, max_level: int) -> Decision:
    """Return what becomes of a policy's answer under an order.

    Args:
        decision: the answer.
        order: in force now; None = none is.
        max_level: the deepest level that the policy's own bounds allow now; no order goes beyond.
    """
    if order is None or (not order.is_exact and decision.level <= order.level):
        return decision
    level = min(order.level, max_level)
    reason = order.reason if level == order.level else f"{order.reason}; the policy allows level {level}"
    is_final = order.is_exact or decision.is_final
    return Decision(level, reason, decision.max_queued_tokens, min(decision.min_floor, level), is_final)
