"""Batches made ready while the device computes: on the host by a thread, by frozen encoders on a stream."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch

from deco_scale.training.inputs import Batch, EncoderOutputs, split

_JOIN_S = 10.0
_POLL_S = 0.2
"""How often a thread that waits for room looks whether it was closed."""


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
        self._thread = threading.Thread(target=self._pull, name="host_prefetch", daemon=True)
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
        """End the thread. Batches that were ready are not lost: a resume counts samples trained on."""
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
            with suppress(queue.Full):
                self._ready.put(item, timeout=_POLL_S)
                return True
        return False


class EncoderPrefetcher:
    """Starts the frozen encoders on the next batch before a batch is handed out.

    On a GPU they run on a stream of their own and fill gaps of the step; elsewhere they only run earlier. Costs
    the memory of one more batch's encoder outputs. ``encode`` takes a micro-batch.
    """

    def __init__(self, encode: Callable[[Batch], EncoderOutputs], device: torch.device) -> None:
        self._encode, self._device = encode, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def iterate(
        self, batches: Iterator[Batch], *, accumulation: int, count: int
    ) -> Iterator[tuple[Batch, list[EncoderOutputs]]]:
        """``count`` batches, each with the encoders' outputs for its ``accumulation`` micro-batches."""
        upcoming = self._start(next(batches), accumulation)
        for left in range(count - 1, -1, -1):
            batch, outputs, done = upcoming
            if left:
                upcoming = self._start(next(batches), accumulation)
            if done is not None:
                here = torch.cuda.current_stream(self._device)
                here.wait_event(done)
                for tensor in (t for each in outputs for t in each if t is not None):
                    # The memory belongs to the other stream's allocator; it must not be reused too early.
                    tensor.record_stream(here)
            yield batch, outputs

    def _start(
        self, batch: Batch, accumulation: int
    ) -> tuple[Batch, list[EncoderOutputs], torch.cuda.Event | None]:
        # Micro-batch by micro-batch, as without prefetching: another batch size would round differently.
        if self._stream is None:
            return batch, [self._encode(micro) for micro in split(batch, accumulation)], None
        with torch.cuda.stream(self._stream):
            outputs = [self._encode(micro) for micro in split(batch, accumulation)]
            return batch, outputs, self._stream.record_event()
