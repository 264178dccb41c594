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
        alone = [self._predictor.alone_s(level, load) for level in range(self._num_levels)]
        least_ttft_s, least_tpot_s = map(min, zip(*alone, strict=True))
        beyond = [
            f"{name} of {limit_s:g} s (a lone request takes {least_s:.2g} s)"
            for name, limit_s, least_s in (
                ("ttft_s", load.ttft_s, least_ttft_s),
                ("tpot_s", load.tpot_s, least_tpot_s),
            )
            if least_s > bar * limit_s
        ]
        was_kept = not self.why_not
        self.why_not = f"no level keeps a {' or a '.join(beyond)}" if beyond else ""
        return was_kept and bool(beyond)
