"""The MorphServe YAML. Every field is documented here and in the file that `morphserve init` writes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from morphserve.cache import cache_root
from morphserve.errors import ConfigError
from morphserve.user_input import user_path
from policies import PolicyConfig, SloConfig

# Which formats there are, the kernels say, and these need torch: `check_formats` asks later. All end in their bits; "/"
# joins two halves.
FormatName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*[0-9]$")]


def _reachable(path: Path) -> Path:
    user_path(path)
    return path


UserPath = Annotated[Path, AfterValidator(_reachable)]  # as it was written; whose `~` is somebody's


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LadderStep(_Section):
    """A run of levels that put more and more layers into one format."""

    format: FormatName = Field(
        description="w8 = W8A8 int8, w4 = 4 bit, group 64/32, fp8; `morphserve check` lists all"
    )
    layers: int | Literal["all"] = Field("all", description="how many layers, in `order`")
    layers_per_level: int = Field(5, ge=1, description="layers one level adds to the one before")
    optional: bool = Field(
        False, description="left out, with a warning, where no kernel runs the format; else the start is refused"
    )


class LadderConfig(_Section):
    """The levels that exist."""

    order: Literal["profile", "front_to_back", "back_to_front"] | list[int] | None = Field(
        None,
        description="swap order of decoder layers; null = the profile's, without one from three quarters of the depth "
        "outwards, the last layer last",
    )
    steps: Annotated[list[LadderStep], Field(min_length=1)] | Literal["profile"] | None = Field(
        None,
        description="null = the profile's ladder, level by level; without one 8 bits, then w4 as far as expected_kl "
        "and quality allow, what runs of them here",
    )
    expected_kl: dict[str, float] = Field(
        default_factory=dict,
        description="measured nats per token when ALL layers are in that format",
    )


class QualityConfig(_Section):
    """What a level may cost."""

    max_kl_per_token: float | None = Field(
        None,
        gt=0,
        description="levels with a higher expected KL, nats per token, are left out; null = 0.15 for the profile's and "
        "the default ladder, no cap for steps that are listed",
    )


class KVConfig(_Section):
    """The ways in which the KV cache grows and shrinks."""

    base_num_blocks: int | None = Field(
        None, ge=2, description="blocks at level 0; null = what vLLM itself would have published"
    )
    max_num_blocks: int | None = Field(None, ge=2, description="never publish more than this")
    migrate_blocks_per_step: int | None = Field(
        None, ge=1, description="live and cached blocks moved per engine step; null = 16, on a GPU 256"
    )
    max_preemptions: int = Field(
        0, ge=0, description="requests one way back may preempt when it finds no room, one per half a drain_timeout_s"
    )
    prefix_reuse: Literal["any", "not_worse", "exact"] = Field(
        "not_worse",
        description="cached KV a request may reuse: any; what its level or a better one wrote; what its level wrote",
    )
    drain_timeout_s: float = Field(
        5.0, gt=0, description="a shrink that found no room for live blocks gives up after this"
    )

    @property
    def blocks_per_step(self) -> int:
        """`migrate_blocks_per_step`, or what it stands for where nothing else is known."""
        return self.migrate_blocks_per_step or 16


class TransitionConfig(_Section):
    """The pace at which levels change."""

    max_layers_per_step: int | None = Field(
        None,
        ge=1,
        description="layers switched between two engine steps; sets the staging reserve; null = 5, on a GPU a whole "
        "level, or what 3 % of its memory and 6 % of what weights leave the engine hold",
    )
    max_pause_ms: float = Field(
        30.0, gt=0, description="fewer layers per step when they take longer than this"
    )
    rank_timeout_s: float = Field(
        30.0,
        gt=0,
        description="a swap batch that a rank has not prepared this long after it was asked is given up on all ranks; "
        "the steps ahead of it count, so stay above three of the longest; half of it is for reading files",
    )
    backoff_s: float = Field(5.0, ge=0, description="no new transition this long after a failure")
    backoff_max_s: float = Field(
        60.0, ge=0, description="what keeps failing waits twice as long each time, up to this or backoff_s"
    )

    @property
    def layers_per_step(self) -> int:
        """`max_layers_per_step`, or what it stands for where nothing else is known."""
        return self.max_layers_per_step or 5


class AdminConfig(_Section):
    """Who may look from outside, and who may change something."""

    token_file: Path | None = Field(
        None, description="file (0600) of the token that changes something must show; null = nothing can be changed"
    )
    read_token_file: Path | None = Field(
        None, description="likewise for the status; with neither of the two it is for this machine alone"
    )


class MorphServeConfig(_Section):
    """The root of the YAML."""

    version: Literal[1] = 1
    ladder: LadderConfig = LadderConfig()
    quality: QualityConfig = QualityConfig()
    kv: KVConfig = KVConfig()
    transition: TransitionConfig = TransitionConfig()
    policy: PolicyConfig = Field(default_factory=lambda: SloConfig(kind="slo"))
    admin: AdminConfig = AdminConfig()
    variants: dict[FormatName, str] = Field(
        default_factory=dict,
        description="by format: directory or hub name of a GPTQ, AWQ or compressed-tensors checkpoint of this model",
    )
    kernels: dict[FormatName, str] = Field(
        default_factory=dict, description="by format: the kernel to use; else the first that passes its self-test"
    )
    profile: UserPath | None = Field(
        None, description="directory that `morphserve profile` made for this model; null = see `prepared`"
    )
    step_times: UserPath | None = Field(
        None, description="file that `morphserve calibrate` made; null = the profile's, else see `prepared`"
    )
    prepared: bool = Field(
        True,
        description="where no profile or step times are named, use what `morphserve prepare` has stored of this very "
        "model, machine, dtype and topology, or what comes with the package; false = only what is named here",
    )
    prepare: Literal["when_idle"] | None = Field(
        None,
        description="when_idle = a server without a profile, on a CPU, makes it in a child process while it has no "
        "requests; null = `morphserve prepare` alone does",
    )
    cache_dir: Annotated[UserPath, BeforeValidator(lambda given: cache_root() if given is None else given)] = Field(
        default_factory=cache_root,
        description="packed variants, built once, verified, then read; and what was prepared. null = MORPHSERVE_CACHE "
        "of the environment, else ~/.cache/morphserve",
    )
    decision_log: UserPath | None = Field(
        None,
        description="JSONL of signals and decisions, gzip'd if it ends in .gz, replica 1 in NAME.1.jsonl; null = off",
    )
    decision_log_detail: Literal["changes", "all"] = Field(
        "changes",
        description="changes = new levels, else one row a second; all = all that the policy was asked, to be replayed",
    )

    @model_validator(mode="after")
    def _prepares_what_it_uses(self) -> Self:
        if self.prepare is not None and not self.prepared:
            raise ValueError(
                f"prepare: {self.prepare} makes what `prepared: false` never looks for. Leave one of the two out."
            )
        return self


def check_formats(config: MorphServeConfig, known: Collection[str]) -> None:
    """Refuse names of formats that do not exist.

    Raises:
        ConfigError: says where they stand.
    """
    steps = config.ladder.steps if isinstance(config.ladder.steps, list) else []
    named = [(f"ladder.steps[{number}].format", step.format) for number, step in enumerate(steps)]
    for section, formats in (
        ("ladder.expected_kl", config.ladder.expected_kl),
        ("variants", config.variants),
        ("kernels", config.kernels),
    ):
        named += [(section, fmt) for fmt in formats]
    if unknown := [f"{where}: {fmt!r}" for where, fmt in named if fmt not in known]:
        raise ConfigError(f"unknown format in {', '.join(unknown)}; known are {', '.join(known)}. Use one of these.")


def step_times_file(config: MorphServeConfig) -> Path | None:
    """Return the file that the config names, else the profile's, if there is one."""
    if config.step_times is not None or config.profile is None:
        return config.step_times
    own = config.profile.expanduser() / "step_times.json"
    return own if own.is_file() else None
