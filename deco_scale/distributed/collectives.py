"""What ranks tell each other outside the step: errors that all must share, and who speaks."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from deco_scale.errors import ConfigError, Damaged, RunError

T = TypeVar("T")


def raise_together(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; if it fails on any, all raise the first rank's error.

    Only errors that have a name are shared; anything else is a bug and ends the process as it is.
    """
    outcome: tuple[type[ConfigError | RunError], str] | None = None
    result: T | None = None
    try:
        result = action()
    except (ConfigError, RunError) as error:
        kinds: tuple[type[ConfigError | RunError], ...] = (Damaged, ConfigError)
        outcome = next((kind for kind in kinds if isinstance(error, kind)), RunError), str(error)
    outcomes: list[tuple[type[ConfigError | RunError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for rank, found in enumerate(outcomes):
        if found is not None:
            where = f"rank {rank}: " if rank else ""
            raise found[0](where + found[1])
    return result  # type: ignore[return-value]


def together(action: Callable[[], T]) -> T:
    """:func:`agreed` where there are several processes, the action alone where there is one."""
    return raise_together(action) if dist.is_initialized() else action()


def broadcast_object(value: T) -> T:
    """The first process's value, on every process."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    return shared[0]


def run_on_rank_zero(action: Callable[[], T]) -> T:
    """``action`` on rank 0 alone, its result for all ranks, or its error."""
    return broadcast_object(raise_together(lambda: action() if dist.get_rank() == 0 else None))  # type: ignore[return-value]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank."""
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def sum_counters(counters: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    """Counters added up, name by name."""
    summed: Counter[str] = Counter()
    for each in counters:
        summed.update(each)
    return summed
