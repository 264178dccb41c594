"""The `policy:` section of the YAML, typed where it enters and nowhere else."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StaticConfig(_Section):
    """Go to one level at start and stay there."""

    kind: Literal["static"]
    level: int | str = Field(
        0, description="a level index, 'deepest', or a format: the first level with ALL layers in it"
    )


class ThresholdConfig(_Section):
    """The paper's policy: KV use and queueing delay against thresholds, with hysteresis."""

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
        None, description="never deeper than this: index, 'deepest', or a format name; null = mode's"
    )


PolicyConfig = Annotated[StaticConfig | ThresholdConfig, Field(discriminator="kind")]
