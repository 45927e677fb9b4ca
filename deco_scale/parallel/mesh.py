"""Sizes of the device mesh for a number of ranks; all checks run before any process group is built."""

from dataclasses import dataclass

from deco_scale.errors import ConfigError
from deco_scale.parallel.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """Sizes of the device mesh: ``dp_replicate`` x ``dp_shard`` x ``tp`` ranks, tp innermost."""

    dp_replicate: int
    dp_shard: int
    tp: int = 1

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    def dp_rank(self, rank: int) -> int:
        """The data-parallel rank, which has its own part of the global batch."""
        return rank // self.tp


def resolve_parallel_dims(cfg: ParallelConfig, world_size: int) -> ParallelDims:
    """Fit ``cfg`` to ``world_size`` ranks; raises :class:`ConfigError` with the possible values."""
    rest = world_size
    for name in ("tp", "dp_replicate"):
        value = getattr(cfg, name)
        if rest % value:
            options = f"possible: {_divisors(rest)}"
            raise ConfigError(f"parallel.{name}={value} does not divide {rest} of {world_size} ranks; {options}")
        rest //= value
    if cfg.dp_shard not in (-1, rest):
        raise ConfigError(
            f"parallel.dp_replicate={cfg.dp_replicate} x dp_shard={cfg.dp_shard} x tp={cfg.tp} is not the "
            f"world size {world_size}; possible: dp_shard={rest} or -1"
        )
    return ParallelDims(cfg.dp_replicate, rest, cfg.tp)


def accumulation_steps(*, global_batch: int, micro_batch: int, dp: int, where: str) -> int:
    """Micro-batches per step; raises :class:`ConfigError` listing the micro-batches that would fit."""
    if global_batch % dp:
        raise ConfigError(
            f"{where}.global_batch={global_batch} does not divide over {dp} data-parallel ranks; "
            f"possible numbers of ranks: {_divisors(global_batch, 4096)}"
        )
    per_rank = global_batch // dp
    if per_rank % micro_batch:
        raise ConfigError(
            f"{where}.micro_batch={micro_batch} does not divide the {per_rank} samples of a rank "
            f"(global_batch={global_batch} over {dp} ranks); possible: {_divisors(per_rank)}"
        )
    return per_rank // micro_batch


def _divisors(number: int, largest: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, largest or number) + 1) if number % n == 0]
