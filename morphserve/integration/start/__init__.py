"""Before weights load: what the settings mean on this device, and what is refused."""

from __future__ import annotations

from morphserve.integration.start.checks import (
    check_engine,
    check_platform,
    current_device_type,
    make_policy,
    nominal_ladder,
    policy_setup,
)
from morphserve.integration.start.device_budget import check_fixed_kv, check_given_blocks
from morphserve.integration.start.device_checks import check_device
from morphserve.integration.start.settings import (
    CONFIG_FILE,
    KEY,
    config_file,
    for_this_device,
    is_active,
    read_settings,
    served_ladder,
)

__all__ = [
    "CONFIG_FILE",
    "KEY",
    "check_device",
    "check_engine",
    "check_fixed_kv",
    "check_given_blocks",
    "check_platform",
    "config_file",
    "current_device_type",
    "for_this_device",
    "is_active",
    "make_policy",
    "nominal_ladder",
    "policy_setup",
    "read_settings",
    "served_ladder",
]
