"""Before weights load: what the settings mean on this device, and what is refused.

Each of vLLM's processes comes through this door, also where nobody asks for MorphServe. So only the settings load with
it; the checks, which need torch and the mechanisms, load when one of them is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphserve.integration.start.frontend import check_frontend
from morphserve.integration.start.hangup import hangup_is_free, ignore_hangups
from morphserve.integration.start.settings import (
    CONFIG_FILE,
    FOUND,
    KEY,
    config_file,
    for_this_device,
    formats_over,
    is_active,
    ladder_note,
    read_settings,
    served_ladder,
    settings_of,
)
from morphserve.late import late

if TYPE_CHECKING:
    from morphserve.integration.start.checks import (
        check_engine,
        make_policy,
        nominal_ladder,
        policy_setup,
    )
    from morphserve.integration.start.device import (
        check_platform,
        default_formats,
        device_type,
        is_cuda,
        serving_residence,
    )
    from morphserve.integration.start.device_budget import check_fixed_kv, check_given_blocks, levels_of_a_format
    from morphserve.integration.start.device_checks import check_device
    from morphserve.integration.start.idle import IdleWork, idle_work
    from morphserve.integration.start.prepared import attach_prepared

__all__ = [
    "CONFIG_FILE",
    "FOUND",
    "KEY",
    "IdleWork",
    "attach_prepared",
    "check_device",
    "check_engine",
    "check_fixed_kv",
    "check_frontend",
    "check_given_blocks",
    "check_platform",
    "config_file",
    "default_formats",
    "device_type",
    "for_this_device",
    "formats_over",
    "hangup_is_free",
    "idle_work",
    "ignore_hangups",
    "is_active",
    "is_cuda",
    "ladder_note",
    "levels_of_a_format",
    "make_policy",
    "nominal_ladder",
    "policy_setup",
    "read_settings",
    "served_ladder",
    "serving_residence",
    "settings_of",
]

_LATE = {
    "IdleWork": "idle",
    "attach_prepared": "prepared",
    "check_device": "device_checks",
    "check_engine": "checks",
    "check_fixed_kv": "device_budget",
    "check_given_blocks": "device_budget",
    "check_platform": "device",
    "default_formats": "device",
    "device_type": "device",
    "idle_work": "idle",
    "is_cuda": "device",
    "levels_of_a_format": "device_budget",
    "serving_residence": "device",
    "make_policy": "checks",
    "nominal_ladder": "checks",
    "policy_setup": "checks",
}
__getattr__ = late(__name__, _LATE)
