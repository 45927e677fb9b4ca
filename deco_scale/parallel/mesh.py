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
    """Micro-batches per step, of the size of :func:`fit_micro_batch`, which raises where none fits."""
    batches = {"global_batch": global_batch, "micro_batch": micro_batch}
    return global_batch // dp // fit_micro_batch(**batches, dp=dp, where=where)


def fit_micro_batch(*, global_batch: int, micro_batch: int, dp: int, where: str) -> int:
    """The largest micro-batch up to ``micro_batch`` that divides a rank's samples of a step.

    One recipe thus fits any number of ranks: 64 of 1,536 samples is 48 on 16 or 32 ranks and 3 on 512. Raises
    :class:`ConfigError` with the possible values if ``global_batch`` does not divide over ``dp`` ranks, or if only
    less than half of ``micro_batch`` would fit, which would waste the device.
    """
    if global_batch % dp:
        raise ConfigError(
            f"{where}.global_batch={global_batch} does not divide over {dp} data-parallel ranks; "
            f"possible numbers of ranks: {_divisors(global_batch, 4096)}"
        )
    per_rank = global_batch // dp
    most = min(micro_batch, per_rank)
    fitting = _divisors(per_rank, most)[-1]
    if 2 * fitting < most:
        raise ConfigError(
            f"{where}.micro_batch={micro_batch} does not divide the {per_rank} samples of a rank "
            f"(global_batch={global_batch} over {dp} ranks); possible: {_divisors(per_rank)}"
        )
    return fitting


def _divisors(number: int, largest: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, largest or number) + 1) if number % n == 0]
