"""The engine in virtual time: the controller, monitor and policies that serve, against a model of vLLM's scheduler.

Neither torch nor vLLM; the same inputs give the same outputs.
"""

from __future__ import annotations

from morphserve.tools.sim.calibration import Calibration, load_calibration
from morphserve.tools.sim.engine import SimEngine
from morphserve.tools.sim.morphing import plan_ladder
from morphserve.tools.sim.request import SimRequest
from morphserve.tools.sim.run import Simulated, is_good, simulate
from morphserve.tools.sim.schedule import Schedule
from morphserve.tools.sim.server import ServerSpec, SimServer

__all__ = [
    "Calibration",
    "Schedule",
    "ServerSpec",
    "SimEngine",
    "SimRequest",
    "SimServer",
    "Simulated",
    "is_good",
    "load_calibration",
    "plan_ladder",
    "simulate",
]
