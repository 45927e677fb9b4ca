"""Every way to spread a run over N GPUs that its engines accept."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

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
    found = []
    for degree in divisors(min(gpus, GPUS_PER_NODE)):
        try:
            check_tp(model, degree)
        except ConfigError:
            continue
        if gpus % degree == 0:
            found.append(degree)
    return found


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
            meshes = [("fsdp", 3, replicate) for replicate in divisors(ranks)]
            meshes += [("deepspeed", stage, 1) for stage in ZERO_STAGES]
            for engine, stage, replicate in meshes:
                found = _parallel(engine, stage, replicate, ranks // replicate, tp, mode)
                if found is not None and allowed(found):
                    resolve_parallel_dims(found, gpus)
                    yield found


def _parallel(
    engine: str, stage: int, replicate: int, shard: int, tp: int, mode: ActivationCheckpointing
) -> ParallelConfig | None:
    """None for combinations that :class:`ParallelConfig` refuses."""
    try:
        return ParallelConfig(
            engine=engine,  # type: ignore[arg-type]
            zero_stage=stage,  # type: ignore[arg-type]
            dp_replicate=replicate,
            dp_shard=shard,
            tp=tp,
            activation_checkpointing=mode,
        )
    except ValueError:
        return None


def micro_batches(global_batch: int, dp: int) -> Sequence[int]:
    """Those that divide a rank's share, ascending; empty where the batch does not divide over ``dp`` ranks."""
    if global_batch % dp:
        return ()
    return [n for n in divisors(global_batch // dp) if n <= MAX_MICRO_BATCH]
