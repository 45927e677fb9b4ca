"""Collectives over Python objects outside of the training step; each also works in a process without a group."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from deco_scale.errors import ConfigError, Damaged, RunError

T = TypeVar("T")


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, by rank in ``group``; that of the default group where None."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    return shared[0]


def raise_together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on every rank of ``group``; if it fails on any, all raise the first failed rank's error.

    The errors of :mod:`deco_scale.errors` are shared, and those of the operating system as :class:`RunError` with
    the file's name; anything else is a bug and propagates as it is.
    """
    if not dist.is_initialized():
        return action()
    failure: tuple[type[ConfigError | RunError], str] | None = None
    result: T | None = None
    try:
        result = action()
    except (ConfigError, RunError) as error:
        failure = next(kind for kind in (Damaged, ConfigError, RunError) if isinstance(error, kind)), str(error)
    except OSError as error:
        failure = RunError, f"{error.filename or 'a file'}: {error.strerror or error}"
    for rank, failed in enumerate(gather_objects(failure, group)):
        if failed is not None:
            kind, message = failed
            raise kind(f"rank {rank}: {message}" if rank else message)
    return result  # type: ignore[return-value]


def run_on_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone; every rank gets its result, or raises its error."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    return broadcast_object(raise_together(lambda: action() if is_first else None))  # type: ignore[return-value]


def sum_counters(counters: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for each in counters:
        total.update(each)
    return total
