"""The `policy:` section of the YAML, typed where it enters and nowhere else."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# YAML reads `no` and `off` as False, which would be level 0: the opposite of what is meant by a floor of `no`.
_Level = Annotated[int, Field(strict=True)] | str


class FloorsConfig(_Section):
    """Who may ask for a level that its request is not served below (`morphserve_max_level`), and for how long."""

    shallowest: _Level | None = Field(
        None, description="the shallowest level that anybody may ask for: 0, 8bit and the like; null = nobody may ask"
    )
    models: dict[str, _Level] = Field(
        default_factory=dict,
        description="the same by what a client names as its model: an adapter, or one of the server's own names",
    )
    keys: dict[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")], _Level] = Field(
        default_factory=dict,
        description="by the first 16 digits of an API key's SHA-256: the same, whatever model its requests name",
    )
    hold_s: float = Field(
        60.0, ge=0, description="seconds an hour that they may hold up a deeper level that the load asks for"
    )
    when_spent: Literal["wait", "refuse"] = Field(
        "wait", description="then they wait until it is over, or new ones are refused until then (503)"
    )

    @property
    def are_allowed(self) -> bool:
        """Whether anybody may ask."""
        return self.shallowest is not None or bool(self.models or self.keys)


class _PolicySection(_Section):
    floors: FloorsConfig = Field(FloorsConfig(), description="levels that requests may ask not to be served below")


class StaticConfig(_PolicySection):
    """Settings of the policy that goes to one level at start and stays there."""

    kind: Literal["static"]
    level: int | str = Field(
        0, description="an index, 'deepest', '8bit' and the like, or a format: the first level with ALL layers in it"
    )


class ThresholdConfig(_PolicySection):
    """Settings of the paper's policy: KV use and queueing delay against thresholds, with hysteresis."""

    kind: Literal["threshold"]
    mode: Literal["accuracy", "default", "performance"] = Field(
        "default", description="presets for every field below that is left out"
    )
    degrade_above: float | None = Field(
        None, gt=0, le=1, description="kv_usage (now, or projected for live requests) that asks for more KV"
    )
    queue_delay_s: float | None = Field(
        None, ge=0, description="age of the oldest waiting request that asks for more KV"
    )
    target_usage: float | None = Field(
        None, gt=0, le=1, description="kv_usage the chosen level should leave; lower = deeper at once"
    )
    restore_below: float | None = Field(
        None, gt=0, le=1, description="kv_usage that the lower level would have, below which we restore"
    )
    restore_after_s: float | None = Field(
        None, ge=0, description="how long it must have stayed so: no queue, no preemption (hysteresis)"
    )
    max_level: int | str | None = Field(
        None,
        description="never deeper than this: 8bit, 4bit and the like = no format of fewer bits; 'deepest', an index, "
        "or a format's name; null = mode's",
    )


class SloConfig(_PolicySection):
    """Settings of the policy that predicts who would be late, and takes the cheapest level that keeps the promise."""

    kind: Literal["slo"]
    mode: Literal["accuracy", "default", "performance"] = Field(
        "default", description="presets for every field below that is left out"
    )
    ttft_s: float = Field(2.0, gt=0, description="promised time to first token, for requests that bring no limit")
    tpot_s: float = Field(0.150, gt=0, description="promised time per output token, likewise")
    request_limits: bool = Field(
        True, description="whether limits that requests bring count; false = those above count for all"
    )
    min_ttft_s: float | None = Field(
        None, gt=0, description="a stricter limit that a request brings counts for nothing; null = a quarter of ttft_s"
    )
    min_tpot_s: float | None = Field(None, gt=0, description="likewise; null = a quarter of tpot_s")
    limits_hold_s: float = Field(
        60.0, ge=0, description="seconds an hour that stricter ones may hold a deeper level than those above ask for"
    )
    target: float | None = Field(
        None, gt=0, lt=1, description="share of requests that may be predicted to break a promise"
    )
    horizon_s: float | None = Field(None, gt=0, description="how far ahead arrivals are forecast and counted")
    dwell_s: float | None = Field(
        None,
        ge=0,
        description="how long a shallower level must have been predicted to do before we restore to it; a tenth of it, "
        "but as long as the way back takes, while level 0 serves the load on average",
    )
    max_level: int | str | None = Field(
        None,
        description="never deeper than this: 8bit, 4bit and the like = no format of fewer bits; 'deepest', an index, "
        "or a format's name; null = mode's",
    )
    nats_per_saved_request: float | None = Field(
        None, gt=0, description="KL, nats summed over tokens, that it may cost to keep one request's promise"
    )
    transitions_per_minute: float = Field(
        20.0, gt=0, description="token bucket: that many changes of the level on average, a third of them at once"
    )
    quality_budget: float | None = Field(
        None, ge=0, description="KL that may be spent per hour, nats summed over tokens; null = no limit"
    )
    shed: bool = Field(
        False, description="with the deepest level predicted to break the promise, refuse new requests (503)"
    )


PolicyConfig = Annotated[StaticConfig | ThresholdConfig | SloConfig, Field(discriminator="kind")]
