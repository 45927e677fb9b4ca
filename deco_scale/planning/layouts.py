"""Layouts that a number of GPUs allows: tp degrees, sharding, micro-batches."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, get_args

from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.models.tp_plan import check_tp
from deco_scale.parallel.config import ParallelConfig
from deco_scale.planning.hardware import GPUS_PER_NODE

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
    model: ModelConfig, gpus: int, *, check: Callable[[ParallelConfig], object]
) -> Iterator[ParallelConfig]:
    """Settings of ``parallel`` with every size filled in, but for those where ``check`` raises ``ValueError``."""
    for tp in tp_degrees(model, gpus):
        ranks = gpus // tp
        settings: list[dict[str, Any]] = [
            *({"engine": "fsdp", "dp_replicate": n, "dp_shard": ranks // n} for n in divisors(ranks)),
            *({"engine": "deepspeed", "zero_stage": n, "dp_shard": ranks} for n in (1, 2, 3)),
        ]
        for mode in get_args(ActivationCheckpointing):
            for each in settings:
                with suppress(ValueError):  # a combination that no run accepts
                    parallel = ParallelConfig(tp=tp, activation_checkpointing=mode, **each)
                    check(parallel)
                    yield parallel
