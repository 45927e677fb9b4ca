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
    """``(task, work(store, task))`` for each task, as they complete; one worker is this process.

    ``work`` must be picklable; each process opens the store anew. Raises :class:`DataError` if one was killed.
    """
    if workers <= 1:
        yield from ((task, work(store, task)) for task in tasks)
        return
    remaining = iter(tasks)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[R], T] = {}
        while True:
            # A short queue: an error should not wait for thousands of submitted tasks.
            for task in itertools.islice(remaining, 2 * workers - len(running)):
                running[pool.submit(_in_process, work, store.url, access, task)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    yield running.pop(future), future.result()
                except BrokenProcessPool as error:
                    raise DataError("a worker was killed, perhaps for memory; try fewer --workers") from error


def _in_process(work: Callable[[Store, T], R], url: str, access: Access, task: T) -> R:
    return work(open_store(url, access), task)
