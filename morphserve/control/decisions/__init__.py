"""Who says which level: the policy that is asked (`policy_host`), under what an operator `orders`, and on the record.

`decision_log` writes down what was asked and answered, `replay_log` asks it again.
"""

from __future__ import annotations

from morphserve.control.decisions.decision_log import DecisionLog, make_header
from morphserve.control.decisions.orders import ORDERS, Action, OrderBody, ReloadBody, parse_order
from morphserve.control.decisions.policy_host import PolicyHost
from morphserve.control.decisions.replay_log import print_replay

__all__ = [
    "Action",
    "DecisionLog",
    "ORDERS",
    "OrderBody",
    "PolicyHost",
    "ReloadBody",
    "make_header",
    "parse_order",
    "print_replay",
]
