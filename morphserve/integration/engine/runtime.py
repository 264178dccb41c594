"""What is known before the scheduler exists: what the ranks' layers weigh, and the KV cache for the whole ladder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphserve.config import MorphServeConfig
from morphserve.control import (
    Ledgers,
    RankBytes,
    build_ladder,
    check_floor,
    kv_granularity,
    largest_batch_bytes,
    make_ledgers,
    most_uneven,
    with_time_factors,
)
from morphserve.errors import ConfigError
from morphserve.integration import seams
from morphserve.integration.describe import RankDescription
from morphserve.integration.engine.resizable import blocks_of_one_request, check_supported
from morphserve.integration.start import check_given_blocks, config_file, served_ladder
from morphserve.integration.worker import check_kinds, geometry_of, granularity_of
from morphserve.profile_ladder import read_ladder
from policies import Ladder, max_level_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = logging.getLogger("vllm.morphserve")
# A step that moves blocks costs the host as much for one as for some hundred: an operation or two for each layer.
_DEVICE_COPIES = 256


def _granularity(kv_cache_config: KVCacheConfig, page_bytes: int | None) -> int:
    """KV blocks that come and go together: one on the host, whose pages are small and need not be full."""
    return 1 if page_bytes is None else granularity_of(geometry_of(kv_cache_config, page_bytes))


class EngineRuntime:
    """What is known before the scheduler exists."""

    def __init__(
        self,
        engine_core: EngineCore,
        vllm_config: VllmConfig,
        config: MorphServeConfig,
        stated: MorphServeConfig | None = None,
    ) -> None:
        """Plan nothing yet. `stated`: the settings as written, where `config` says what they mean on this device."""
        self.engine_core = engine_core
        self.vllm_config = vllm_config
        self.stated = stated or config
        self.ranks: list[RankDescription] = engine_core.model_executor.collective_rpc("morphserve_describe")
        self.config = served_ladder(config, self.ranks[0].left_out)  # `plan_kv` holds the ranks to each other
        self._warn_of_left_out()
        if all(rank.staging_bytes is not None for rank in self.ranks):  # its reserve is what limits a swap batch
            num_layers = vllm_config.model_config.get_total_num_hidden_layers()
            transition = config.transition.model_copy(update={"max_layers_per_step": num_layers})
            self.config = self.config.model_copy(update={"transition": transition})
        if self.in_background and self.config.kv.migrate_blocks_per_step is None:
            kv = self.config.kv.model_copy(update={"migrate_blocks_per_step": _DEVICE_COPIES})
            self.config = self.config.model_copy(update={"kv": kv})
        self.rank_bytes: list[RankBytes] = []
        self.ladder: Ladder = ()
        self.base_num_blocks = 0
        self._spare_num_blocks = 0  # of level 0 at most, once it is known what CUDA graphs take
        self._odd_num_blocks = 0  # that there is memory for beside level 0's, less than a granularity

    def plan_kv(
        self, original: Callable[..., Any], specs: list[dict[str, KVCacheSpec]], available_memory: list[int]
    ) -> list[KVCacheConfig]:
        """KV cache configs for the deepest level's blocks; the scheduler starts with level 0's.

        Raises:
            ConfigError: the budget does not hold one request, or the pool is not one we can resize.
        """
        base = original(self.vllm_config, specs, available_memory)
        for kv_cache_config in base:
            check_supported(self.vllm_config, kv_cache_config)
            if self.in_background:
                check_kinds(kv_cache_config)
        if self.in_background:
            given = self.vllm_config.cache_config.num_gpu_blocks_override
            check_given_blocks(given, base, available_memory)
        if len({tuple(sorted(rank.kernels.items())) for rank in self.ranks}) > 1:
            found = "; ".join(f"rank {rank.rank}: {rank.kernels}" for rank in self.ranks)
            raise ConfigError(f"ranks run other kernels ({found}). Name one for each format under `kernels`.")
        kv = self.config.kv
        granularities = [_granularity(c, rank.page_bytes) for c, rank in zip(base, self.ranks, strict=True)]
        granularity = math.lcm(*granularities)
        held = min(c.num_blocks for c in base)
        self._odd_num_blocks = held % granularity
        self.base_num_blocks = held - self._odd_num_blocks
        if kv.base_num_blocks is not None:
            if kv.base_num_blocks > self.base_num_blocks:
                raise ConfigError(
                    f"kv.base_num_blocks is {kv.base_num_blocks}, memory for the KV cache holds "
                    f"{self.base_num_blocks}. Lower it, or leave it out."
                )
            self.base_num_blocks = kv.base_num_blocks
        check_floor(
            self.base_num_blocks,
            self.vllm_config.model_config.max_model_len,
            self.vllm_config.cache_config.block_size,
            max(blocks_of_one_request(self.vllm_config, kv_cache_config) for kv_cache_config in base),
        )
        block_bytes = [c.kv_cache_tensors[0].size // c.num_blocks for c in base]
        self.rank_bytes = [
            RankBytes(r.layer_bytes, size, q) for r, size, q in zip(self.ranks, block_bytes, granularities, strict=True)
        ]
        self.ladder = self._ladder()
        self._warn_of_stages()
        self._warn_of_rest()
        levels = tuple(level.layer_formats for level in self.ladder)
        rpc = self.engine_core.model_executor.collective_rpc
        rpc("morphserve_plan", args=(self.base_num_blocks, levels))
        given = (kv.base_num_blocks, kv.max_num_blocks, self.vllm_config.cache_config.num_gpu_blocks_override)
        if self.in_background and given == (None, None, None):
            self._spare_num_blocks = self._num_blocks_in(rpc("morphserve_kept_for_graphs"))
        deepest = self._ladder(self._spare_num_blocks)[-1].num_kv_blocks
        for_deepest = seams.put(
            seams.CONFIG_CACHE, "num_gpu_blocks_override", deepest, self.vllm_config.cache_config
        )
        try:
            return original(self.vllm_config, specs, available_memory)
        finally:
            for_deepest.undo()

    def take_spare(self) -> None:
        """Give level 0 what was kept for CUDA graphs and their capture has not taken. Between capture and serving."""
        if not self._spare_num_blocks:
            return
        rpc = self.engine_core.model_executor.collective_rpc
        most = min(self._num_blocks_in(rpc("morphserve_unused_by_graphs")), self._spare_num_blocks)
        # What was odd on one rank may be just what another lacks.
        for spare in (most, most - kv_granularity(self.rank_bytes)):
            wanted = self.base_num_blocks + spare
            if spare <= 0 or min(rpc("morphserve_extend", args=(wanted,))) < wanted:
                continue
            self.base_num_blocks = wanted
            self.ladder = self._ladder()
            logger.info(
                "morphserve: CUDA graphs took less than was kept for them: level 0 has %d KV blocks more, %d; the "
                "deepest level %d.", spare, wanted, self.ladder[-1].num_kv_blocks,
            )  # fmt: skip
            return

    def _num_blocks_in(self, num_bytes: Sequence[int]) -> int:
        """Return how many KV blocks, in whole granularities, so many bytes and the odd blocks hold on every rank."""
        held = min(spare // rank.kv_block_bytes for spare, rank in zip(num_bytes, self.rank_bytes, strict=True))
        held += self._odd_num_blocks
        return held // kv_granularity(self.rank_bytes) * kv_granularity(self.rank_bytes)

    @property
    def kv_block_bytes(self) -> int:
        """Of one block on the rank where it is largest: pipeline stages differ in their number of layers."""
        return max(rank.kv_block_bytes for rank in self.rank_bytes)

    @property
    def in_background(self) -> bool:
        """Ranks hold layers and KV in device pages, and move them beside their forward passes."""
        return self.ranks[0].page_bytes is not None

    @property
    def index(self) -> int:
        """Of this data-parallel replica, 0 where there is only one."""
        return int(self.vllm_config.parallel_config.data_parallel_index)

    @property
    def config_file(self) -> Path | None:
        """That the settings came from; None where they were given as a mapping."""
        return config_file(self.vllm_config.additional_config)

    @property
    def decision_log(self) -> Path | None:
        """Replicas would write into one another's lines: all but the first put their index into the name."""
        path = self.config.decision_log
        if path is None or self.index == 0:
            return path
        packed = ".gz" if path.suffix == ".gz" else ""
        name = Path(path.name.removesuffix(packed))
        return path.with_name(f"{name.stem}.{self.index}{name.suffix}{packed}")

    def make_ledgers(self) -> Ledgers:
        """Make the ledgers of all ranks, at level 0."""
        # A matmul that keeps a copy of its own (oneDNN) is built while the tensor it reads is still there.
        staging = [
            (rank.staging_bytes or largest_batch_bytes(rank.layer_bytes, self.config.transition.layers_per_step))
            + rank.largest_linear_bytes
            for rank in self.ranks
        ]
        return make_ledgers(self.ladder, self.rank_bytes, staging)

    def _warn_of_left_out(self) -> None:
        left_out = self.ranks[0].left_out
        if left_out and self.index == 0:
            logger.warning(
                "morphserve: the ladder does without %s: %s. It has %s.",
                " and ".join(left_out), "; ".join(left_out.values()), " and ".join(self.ranks[0].kernels),
            )  # fmt: skip

    def _ladder(self, more: int = 0) -> Ladder:
        """Make one ladder for all ranks, with so many KV blocks more than level 0 has."""
        ladder = build_ladder(
            self.vllm_config.model_config.get_total_num_hidden_layers(),
            self.rank_bytes,
            self.config.ladder,
            self.base_num_blocks + more,
            self.config.kv.max_num_blocks,
            read_ladder(self.config),
        )
        return with_time_factors(ladder, [rank.layer_times for rank in self.ranks])

    def _warn_of_stages(self) -> None:
        """Say so when a pipeline stage frees what waits for another."""
        if (worst := most_uneven(self.rank_bytes, self.ladder)) is not None:
            level, least, most = worst
            logger.warning(
                "morphserve: level %d frees the bytes of %d KV blocks on one pipeline stage and of %d on another, and "
                "only the fewer can be published. Name layers of every stage in ladder.order; ladder.steps take the "
                "stages in turn, a profile's own levels are taken as they were measured.",
                level, least, most,
            )  # fmt: skip

    def _warn_of_rest(self) -> None:
        """Say so when the policy will never leave level 0, as below 8 bits alone with a maximum of 8bit."""
        policy, ladder = self.config.policy, self.ladder
        if policy.kind == "static" or not ladder[1:] or self.index > 0:
            return
        with suppress(ValueError):  # an unknown level is refused when the policy is built
            if max_level_of(policy, ladder) == 0:
                asked = f"mode {policy.mode}" if policy.max_level is None else f"max_level {policy.max_level}"
                logger.warning(
                    "morphserve: policy.%s allows level 0 alone of a ladder down to %s, so nothing will ever change. "
                    "Set policy.max_level to deepest for more.", asked, " and ".join(sorted(ladder[-1].formats)),
                )  # fmt: skip
