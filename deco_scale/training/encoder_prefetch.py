"""Frozen encoders one batch ahead, beside the step instead of before it."""

from collections.abc import Callable, Iterator

import torch

from deco_scale.training.inputs import Batch, EncoderOutputs, split


class EncoderPrefetcher:
    """Starts encoding the next batch before a batch is handed out.

    On a GPU the encoders run on a stream of their own, so that they fill gaps of the step; elsewhere they only
    run earlier. Costs the encoders' results for one more batch of memory. ``encode`` takes a micro-batch.
    """

    def __init__(self, encode: Callable[[Batch], EncoderOutputs], device: torch.device) -> None:
        self._encode = encode
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def over(
        self, batches: Iterator[Batch], *, parts: int, count: int
    ) -> Iterator[tuple[Batch, list[EncoderOutputs]]]:
        """``count`` batches, each with what was made of its ``parts`` micro-batches."""
        upcoming = self._start(next(batches), parts)
        for left in range(count - 1, -1, -1):
            batch, encoded, done = upcoming
            if left:
                upcoming = self._start(next(batches), parts)
            if done is not None:
                here = torch.cuda.current_stream(self._device)
                here.wait_event(done)
                for tensor in (t for part in encoded for t in part if t is not None):
                    # The memory belongs to the other stream's allocator; it must not be reused too early.
                    tensor.record_stream(here)
            yield batch, encoded

    def _start(self, batch: Batch, parts: int) -> tuple[Batch, list[EncoderOutputs], torch.cuda.Event | None]:
        # Micro-batch by micro-batch, as without this: another batch size would round differently.
        if self._stream is None:
            return batch, [self._encode(part) for part in split(batch, parts)], None
        with torch.cuda.stream(self._stream):
            encoded = [self._encode(part) for part in split(batch, parts)]
            return batch, encoded, self._stream.record_event()
