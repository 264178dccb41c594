"""A promise that is beyond every level, whatever the load."""

from __future__ import annotations

from policies.slo.predictor import Load, Predictor

_AGAIN = 0.8  # of a limit that was beyond reach: so little must a lone request take for it to count again


class Reach:
    """Whether any level keeps the policy's promise for a request that has the engine to itself.

    Where none does, all are late at each level, and predictions say nothing of levels: they would hold the engine
    wherever it is, and have all refused.
    """

    def __init__(self, predictor: Predictor, num_levels: int) -> None:
        """Take it for one that is kept until weighed."""
        self._predictor = predictor
        self._num_levels = num_levels
        self.why_not = ""  # in words; "" = some level keeps it

    def weigh(self, load: Load) -> bool:
        """Look at it anew; return whether it has just gone beyond reach."""
        bar = _AGAIN if self.why_not else 1.0
        beyond = []
        for name, limit_s, alone_s in (
            ("ttft_s", load.ttft_s, self._predictor.alone_ttft_s),
            ("tpot_s", load.tpot_s, self._predictor.alone_tpot_s),
        ):
            levels = range(self._num_levels)
            if not any(alone_s(level, load) <= bar * limit_s for level in levels):  # the first one mostly does
                least_s = min(alone_s(level, load) for level in levels)
                beyond.append(f"{name} of {limit_s:g} s (a lone request takes {least_s:.2g} s)")
        was_kept = not self.why_not
        self.why_not = f"no level keeps a {' or a '.join(beyond)}" if beyond else ""
        return was_kept and bool(beyond)
