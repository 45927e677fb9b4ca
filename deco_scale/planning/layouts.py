"""Every way to spread a run over N GPUs that its engines accept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, get_args

from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.models.tp_plan import check_tp
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.mesh import resolve_parallel_dims
from deco_scale.planning.hardware import GPUS_PER_NODE

ZERO_STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
MAX_MICRO_BATCH = 512
"""Beyond this nothing is gained: a GPU has been full for long."""


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def tp_degrees(model: ModelConfig, gpus: int) -> list[int]:
    """Degrees that keep a tp group within a node and fit the model; 1 always does."""
    degrees = []
    for degree in divisors(min(gpus, GPUS_PER_NODE)):
        with suppress(ConfigError):
            check_tp(model, degree)
            degrees += [degree] if gpus % degree == 0 else []
    return degrees


def enumerate_layouts(
    model: ModelConfig, gpus: int, *, allowed: Callable[[ParallelConfig], bool]
) -> Iterator[ParallelConfig]:
    """Settings of ``parallel`` with every size filled in; ``allowed`` says what the rest of the run permits.

    Raises :class:`ConfigError` unless ``gpus`` is positive.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus} must be at least 1")
    for tp in tp_degrees(model, gpus):
        ranks = gpus // tp
        for mode in get_args(ActivationCheckpointing):
            settings: list[dict[str, Any]] = [
                {"engine": "fsdp", "dp_replicate": n, "dp_shard": ranks // n} for n in divisors(ranks)
            ]
            settings += [{"engine": "deepspeed", "zero_stage": n, "dp_shard": ranks} for n in ZERO_STAGES]
            for each in settings:
                try:
                    parallel = ParallelConfig(tp=tp, activation_checkpointing=mode, **each)
                except ValueError:  # a combination that no run accepts
                    continue
                if allowed(parallel):
                    resolve_parallel_dims(parallel, gpus)
                    yield parallel


def micro_batches(global_batch: int, dp: int) -> Sequence[int]:
    """Those that divide a rank's share, ascending; empty where the batch does not divide over ``dp`` ranks."""
    if global_batch % dp:
        return ()
    return [n for n in divisors(global_batch // dp) if n <= MAX_MICRO_BATCH]
