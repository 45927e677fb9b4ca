"""Batches pulled and made ready by a thread while the device computes, so that copies to it overlap the step."""

import queue
import threading
from collections.abc import Callable, Iterator

from deco_scale.training.inputs import Batch

_JOIN_S = 10.0
_LOOK_S = 0.2
"""How often a waiting thread looks whether it is still wanted."""


class HostPrefetcher:
    """The batches of ``source`` in order, ``depth`` of them ready; an error there is raised here.

    ``prepare`` is applied to each batch in the thread.
    """

    def __init__(
        self, source: Iterator[Batch], *, depth: int, prepare: Callable[[Batch], Batch] | None = None
    ) -> None:
        self._source, self._prepare = source, prepare
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pull, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._stop.set()
            raise item
        return item

    def close(self) -> None:
        """End the thread; batches that were ready are lost to nobody, since positions count samples trained on."""
        self._stop.set()
        # A read that is being tried again is not waited for.
        self._thread.join(_JOIN_S)

    def _pull(self) -> None:
        try:
            for batch in self._source:
                if not self._offer(self._prepare(batch) if self._prepare else batch):
                    return
            self._offer(StopIteration())
        # Whatever it is, the training thread shall see it.
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: Batch | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_LOOK_S)
                return True
            except queue.Full:
                continue
        return False
