"""Simulate policies on windows, in as many processes as there are cores. How many does not change the scores."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType

from morphserve.config import MorphServeConfig
from morphserve.control import ProfileLadder
from morphserve.errors import ConfigError
from morphserve.tools.sim import Calibration, SimServer, simulate
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.score import Score, score_of
from morphserve.tools.workload import Slo, Window, read_windows


@dataclass(frozen=True, slots=True)
class World:
    """Everything of a simulation but the policy; travels once to every process."""

    windows: tuple[Window, ...]  # dev, then held-out
    num_dev: int
    server: SimServer
    calibration: Calibration
    slo: Slo
    profile: ProfileLadder | None = None

    @property
    def dev(self) -> range:
        """Indices of the dev windows."""
        return range(self.num_dev)

    @property
    def held_out(self) -> range:
        """Indices of the held-out windows."""
        return range(self.num_dev, len(self.windows))


def load_windows(dev: Sequence[str], held_out: Sequence[str]) -> tuple[list[Window], list[Window]]:
    """Read the windows that a study searches on, and those that it only scores.

    Raises:
        TuningError: no dev window, or a window that is both dev and held-out.
        WorkloadError: an option that is none, or a trace that cannot be read or of which nothing is left.
    """
    seen: dict[str, int] = {}
    groups = [read_windows(texts, seen) for texts in (dev, held_out)]
    if not groups[0]:
        raise TuningError("no dev window, and a policy is tuned on at least one. Give --dev TRACE.")
    both = {w.digest for w in groups[0]} & {w.digest for w in groups[1]}
    if both:
        names = ", ".join(w.source for w in groups[1] if w.digest in both)
        raise TuningError(
            f"held-out {names} is also a dev window: its score would say nothing about other traffic. Cut another one."
        )
    return groups[0], groups[1]


@dataclass(frozen=True, slots=True)
class Invalid:
    """A config that a server would refuse at start, and its reason."""

    reason: str


Scored = list[Score] | Invalid  # one a window


def run_window(world: World, config: MorphServeConfig | None, index: int) -> Score | Invalid:
    """Score one policy on one window; `None` is stock vLLM.

    Raises:
        WorkloadError: the window does not fit the server: no policy's fault.
        TuningError: see `score_of`.
    """
    try:
        simulated = simulate(
            world.windows[index].workload, world.server, config, world.calibration, profile=world.profile
        )
    except ConfigError as e:
        return Invalid(str(e))
    return score_of(simulated, world.slo)


class Evaluator:
    """A context manager that simulates in this process, or in several others."""

    def __init__(self, world: World, jobs: int) -> None:
        self.world = world
        self._jobs = jobs
        self._pool: ProcessPoolExecutor | None = None
        self._known: dict[tuple[str, int], Score | Invalid] = {}  # searches come back to what they tried

    def __enter__(self) -> Evaluator:
        if self._jobs > 1:
            # Not fork: numpy's threads and a terminal's progress display may be alive in this process.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._jobs, context, _begin, (self.world,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def scores(self, configs: Sequence[MorphServeConfig | None], windows: Sequence[int]) -> Iterator[Scored]:
        """Yield scores for each config, in their order, as soon as it and all before it are there."""
        names = ["stock" if c is None else json.dumps(c.model_dump(mode="json"), sort_keys=True) for c in configs]
        pending: dict[tuple[str, int], Future[Score | Invalid]] = {}
        if self._pool is not None:
            for name, config in zip(names, configs, strict=True):
                for window in windows:
                    if (name, window) not in self._known and (name, window) not in pending:
                        pending[name, window] = self._pool.submit(_run_here, config, window)
        for name, config in zip(names, configs, strict=True):
            scored: list[Score] = []
            invalid: Invalid | None = None
            for window in windows:
                answer = self._answer((name, window), config, pending)
                if isinstance(answer, Invalid):
                    invalid = answer
                    break
                scored.append(answer)
            yield invalid or scored

    def _answer(
        self,
        key: tuple[str, int],
        config: MorphServeConfig | None,
        pending: dict[tuple[str, int], Future[Score | Invalid]],
    ) -> Score | Invalid:
        if key not in self._known:
            try:
                future = pending.get(key)
                answer = run_window(self.world, config, key[1]) if future is None else future.result()
            except BrokenProcessPool as e:
                raise TuningError(
                    f"one of {self._jobs} simulating processes died, perhaps for want of memory. Finished trials are "
                    "kept: run again to go on, with --jobs 1 if it happens again."
                ) from e
            self._known[key] = answer
        return self._known[key]


_world: World | None = None  # of a simulating process


def _begin(world: World) -> None:
    """Leave Ctrl-C to the process that waits for us, and keep the world."""
    global _world
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _world = world


def _run_here(config: MorphServeConfig | None, index: int) -> Score | Invalid:
    assert _world is not None
    return run_window(_world, config, index)
