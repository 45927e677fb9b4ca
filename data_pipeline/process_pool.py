"""One function over many shards, by several processes."""

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_pipeline.errors import DataError
from data_pipeline.storage.base import Access, Store, open_store

T = TypeVar("T")
R = TypeVar("R")


def over_processes(
    work: Callable[[Store, T], R], tasks: Iterable[T], *, store: Store, access: Access, workers: int
) -> Iterator[tuple[T, R]]:
    """``work(store, task)`` for each task, with its task, in the order in which they end.

    ``work`` is a module's function. A process opens the store anew. One worker is this process. Raises
    :class:`DataError` where a process was killed.
    """
    if workers <= 1:
        for task in tasks:
            yield task, work(store, task)
        return
    left = iter(tasks)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[R], T] = {}
        while True:
            # A few in hand, so that an error does not wait for a queue of thousands.
            for task in itertools.islice(left, 2 * workers - len(running)):
                running[pool.submit(_there, work, store.url, access, task)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise DataError("a worker was killed, perhaps for memory; try fewer --workers") from error
                yield running.pop(future), result


def _there(work: Callable[[Store, T], R], url: str, access: Access, task: T) -> R:
    return work(open_store(url, access), task)
