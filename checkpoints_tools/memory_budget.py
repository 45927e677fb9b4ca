"""Parallel work on many tensors, of which only a bounded number of bytes is in memory."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from checkpoints_tools.base import TensorSpec
from data_pipeline.storage.files import make_durable

Item = TypeVar("Item")

_MIN_BUDGET = 256 * 2**20
"""Bytes of tensors that may always be in memory at a time."""
_SYNC_THREADS = 8
"""Files that are made durable at a time; the threads only wait."""


def use_large_pages() -> None:
    """Let PyTorch ask for large memory pages, with which reading into new tensors is several times as fast.

    Works where the kernel offers them on request. Call it before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def peak_bytes(spec: TensorSpec) -> int:
    """Bytes in memory while a tensor is converted to fp32: also as stored, if that is another type."""
    wide = spec.numel * 4
    return wide if spec.dtype == torch.float32 else wide + spec.nbytes


def tensor_budget(specs: Iterable[TensorSpec], memory: int | None) -> int:
    """A quarter more than the largest tensor, and at least 256 MiB; ``memory`` if that is less."""
    budget = max(_MIN_BUDGET, max((peak_bytes(spec) for spec in specs), default=0) * 5 // 4)
    return budget if memory is None else min(budget, memory)


class MemoryBudget:
    """Bytes that threads may use together; a tensor larger than the limit gets all of it."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._freed = threading.Condition()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Wait until ``size`` bytes are free, and reserve them in the context."""
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._freed:
                self._used -= size
                self._freed.notify_all()


def in_threads(work: Callable[[Item], None], items: Sequence[Item], workers: int) -> None:
    """Call ``work`` for each item; after an error the remaining items are not started, and it is raised."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for done in as_completed([pool.submit(work, item) for item in items]):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def sync_files(items: Sequence[Path | int]) -> None:
    """Make files (by path or descriptor) durable; waiting for many at once is much faster than one by one."""
    in_threads(lambda item: os.fsync(item) if isinstance(item, int) else make_durable(item), items, _SYNC_THREADS)
