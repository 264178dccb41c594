"""Bursty traffic by seed, in the form that studies of production traces give it.

Gaps between arrivals are gamma or Weibull with a coefficient of variation of their own (1 = Poisson), on a clock that
bursts speed up; prompts and answers are log-normal. Production varies at two scales at once, and so does this: gaps
within seconds, the rate over tens of seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from morphserve.tools.workload.errors import WorkloadError
from morphserve.tools.workload.formats import TraceRequest

PREFIX = "synthetic:"


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """The values that `synthetic:SEED,key=value,...` may give."""

    seed: int
    duration: float = 72.0  # seconds
    rate: float = 1.1  # requests per second, over calm and bursts
    cv: float = 1.5  # of the gaps
    gaps: str = "gamma"  # or weibull
    burst: float = 4.0  # rate in a burst against the rate between bursts; 1 = no bursts
    burst_s: float = 8.0  # mean length of a burst
    calm_s: float = 24.0  # mean time between bursts
    input: float = 50.0  # median prompt, tokens
    input_sigma: float = 0.7  # of its logarithm
    output: float = 120.0  # median answer, tokens
    output_sigma: float = 0.8


HELP = (
    "or synthetic:SEED[,key=value...], bursts by seed; keys and defaults: "
    + ", ".join(f"{field.name}={field.default}" for field in fields(SyntheticSpec)[1:])
    + " (s, req/s, tokens; gaps = gamma or weibull; lengths are medians of log-normals: cut them with --input-clip, "
    "--output-clip)"
)


def is_synthetic(workload: str) -> bool:
    """Return whether it is a specification and names no file."""
    return workload.startswith(PREFIX)


def parse_synthetic(text: str) -> SyntheticSpec:
    """Read `synthetic:SEED,key=value,...`.

    Raises:
        WorkloadError: no seed, an unknown key, or a value out of bounds.
    """
    seed, *settings = text.removeprefix(PREFIX).split(",")
    try:
        spec = SyntheticSpec(int(seed))
    except ValueError as e:
        raise WorkloadError(f"{text}: seed {seed!r} is no whole number. Write synthetic:7,rate=2.") from e
    known = {field.name for field in fields(SyntheticSpec)} - {"seed"}
    given: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise WorkloadError(f"{text}: unknown key {key!r}; known are {', '.join(sorted(known))}.")
        try:
            given[key] = value if key == "gaps" else float(value)
        except ValueError as e:
            raise WorkloadError(f"{text}: {key} is {value!r}, must be a number.") from e
    spec = replace(spec, **given)
    _check(spec, text)
    return spec


def generate(spec: SyntheticSpec) -> list[TraceRequest]:
    """Generate the same requests for the same spec, in arrival order; the first need not come at 0."""
    streams = [np.random.default_rng([spec.seed, i]) for i in range(4)]  # so that lengths do not move with the rate
    edges_s, work = _clock(spec, streams[0])
    gaps = _gaps(spec, streams[1], work[-1])
    arrivals_s = np.interp(np.cumsum(gaps), work, edges_s)
    arrivals_s = arrivals_s[np.cumsum(gaps) < work[-1]]
    inputs = streams[2].lognormal(math.log(spec.input), spec.input_sigma, len(arrivals_s))
    outputs = streams[3].lognormal(math.log(spec.output), spec.output_sigma, len(arrivals_s))
    return [
        TraceRequest(float(at), max(1, round(prompt)), max(1, round(answer)))
        for at, prompt, answer in zip(arrivals_s.tolist(), inputs.tolist(), outputs.tolist(), strict=True)
    ]


def _clock(spec: SyntheticSpec, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return edges of calm and bursts in seconds, and how many requests are expected until each."""
    edges_s, speeds = [0.0], []
    in_burst = rng.random() < spec.burst_s / (spec.burst_s + spec.calm_s)
    while edges_s[-1] < spec.duration:
        length_s = rng.exponential(spec.burst_s if in_burst else spec.calm_s)
        edges_s.append(min(edges_s[-1] + max(length_s, 1e-6), spec.duration))
        speeds.append(spec.burst if in_burst else 1.0)
        in_burst = not in_burst
    work = np.concatenate([[0.0], np.cumsum(np.diff(edges_s) * speeds)])
    return np.asarray(edges_s), work * (spec.rate * spec.duration / work[-1])


def _gaps(spec: SyntheticSpec, rng: np.random.Generator, total: float) -> np.ndarray:
    """Draw positive numbers of mean 1, enough to sum up to more than `total`."""
    count = int(total + 10 * (1 + spec.cv) * math.sqrt(total + 1)) + 16
    while True:
        if spec.gaps == "gamma":
            shape = 1.0 / spec.cv**2
            gaps = rng.gamma(shape, 1.0 / shape, count)
        else:
            shape = _weibull_shape(spec.cv)
            gaps = rng.weibull(shape, count) / math.gamma(1.0 + 1.0 / shape)
        if gaps.sum() > total:
            return np.asarray(gaps)
        count *= 2


def _weibull_shape(cv: float) -> float:
    """Find the shape whose coefficient of variation is `cv`; it falls as the shape rises."""
    low, high = 0.1, 100.0
    for _ in range(100):
        shape = math.sqrt(low * high)
        log_ratio = math.lgamma(1.0 + 2.0 / shape) - 2.0 * math.lgamma(1.0 + 1.0 / shape)
        low, high = (shape, high) if math.expm1(log_ratio) > cv**2 else (low, shape)
    return math.sqrt(low * high)


def _check(spec: SyntheticSpec, text: str) -> None:
    if spec.seed < 0:
        raise WorkloadError(f"{text}: seed is {spec.seed}, must be 0 or more.")
    bounds = {
        "duration": (0.1, 1e6), "rate": (1e-3, 1e4), "cv": (0.05, 20.0), "burst": (1.0, 1e3), "burst_s": (0.1, 1e5),
        "calm_s": (0.1, 1e5), "input": (1.0, 1e6), "input_sigma": (0.0, 5.0), "output": (1.0, 1e6),
        "output_sigma": (0.0, 5.0),
    }  # fmt: skip
    for key, (low, high) in bounds.items():
        value = getattr(spec, key)
        if not low <= value <= high:
            raise WorkloadError(f"{text}: {key} is {value:g}, must be {low:g} to {high:g}.")
    if spec.gaps not in ("gamma", "weibull"):
        raise WorkloadError(f"{text}: gaps is {spec.gaps!r}, must be gamma or weibull.")
    if spec.rate * spec.duration > 1e7:
        raise WorkloadError(
            f"{text}: rate * duration is {spec.rate * spec.duration:g} requests, at most 1e7. Lower one of them."
        )
