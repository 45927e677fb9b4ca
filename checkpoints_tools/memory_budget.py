"""Work on many tensors at once, of which only so many bytes are in memory."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from checkpoints_tools.base import TensorSpec

Item = TypeVar("Item")

_SMALL = 256 * 2**20
"""Bytes of tensors that may always be held at a time."""


SYNC_THREADS = 8
"""Files that are made durable at a time; the threads only wait."""


def use_large_pages() -> None:
    """Let PyTorch ask for large pages of memory, with which reading into new tensors is several times as fast.

    Where the kernel offers them on request; to be called before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def held_bytes(spec: TensorSpec) -> int:
    """Bytes while a tensor is copied to fp32: as stored too, where that is another type."""
    wide = spec.numel * 4
    return wide if spec.dtype == torch.float32 else wide + spec.nbytes


def tensor_budget(specs: Iterable[TensorSpec], memory: int | None) -> int:
    """A quarter more than the largest tensor, and 256 MiB at least; ``memory`` where that is less."""
    wanted = max(_SMALL, max((held_bytes(spec) for spec in specs), default=0) * 5 // 4)
    return wanted if memory is None else min(wanted, memory)


class Budget:
    """Bytes that threads may hold together; what is larger than all of it is held alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until ``size`` bytes are free, and hold them in the context."""
        with self._freed:
            self._freed.wait_for(lambda: self._held == 0 or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._freed:
                self._held -= size
                self._freed.notify_all()


def in_threads(work: Callable[[Item], None], items: Sequence[Item], workers: int) -> None:
    """``work`` for each item; after an error the rest is not begun, and the error raised."""
    failed = threading.Event()

    def one(item: Item) -> None:
        if failed.is_set():
            return
        try:
            work(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for future in [pool.submit(one, item) for item in items]:
            future.result()
