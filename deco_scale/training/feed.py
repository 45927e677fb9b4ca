"""Batches pulled, and pinned, by a thread while the device computes, so that copies to it overlap the step."""

import queue
import threading
from collections.abc import Iterator

import torch

from deco_scale.training.batch import Batch, Part

_JOIN_S = 10.0
_LOOK_S = 0.2
"""How often a waiting thread looks whether it is still wanted."""


class Feed:
    """The batches of ``source`` in order, ``depth`` of them ready; an error there is raised here.

    ``pin`` page-locks the pictures, which needs CUDA.
    """

    def __init__(self, source: Iterator[Batch], *, depth: int, pin: bool) -> None:
        self._source, self._pin = source, pin
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
                if not self._offer(self._pinned(batch)):
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

    def _pinned(self, batch: Batch) -> Batch:
        if not self._pin:
            return batch
        # From page-locked memory a copy does not hold up the host.
        images = torch.as_tensor(batch.images).pin_memory()
        return Part(images, batch.captions, batch.labels, batch.numbers, batch.states)
