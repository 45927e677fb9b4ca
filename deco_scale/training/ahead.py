"""Text encoding one batch ahead, beside the step instead of before it."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deco_scale.training.batch import Batch, split


class TextAhead:
    """Starts encoding the next batch's captions before a batch is handed out.

    On a GPU the encoder runs on a stream of its own, so that it fills gaps of the step; elsewhere it only
    runs earlier. Costs the text states of one more batch of memory.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], device: torch.device) -> None:
        self._encode = encode
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def over(self, batches: Iterator[Batch], *, parts: int, count: int) -> Iterator[tuple[Batch, list[Tensor]]]:
        """``count`` batches, each with the text states of its ``parts`` micro-batches."""
        upcoming = self._start(next(batches), parts)
        for left in range(count - 1, -1, -1):
            batch, texts, done = upcoming
            if left:
                upcoming = self._start(next(batches), parts)
            if done is not None:
                here = torch.cuda.current_stream(self._device)
                here.wait_event(done)
                for text in texts:
                    # The memory belongs to the other stream's allocator; it must not be reused too early.
                    text.record_stream(here)
            yield batch, texts

    def _start(self, batch: Batch, parts: int) -> tuple[Batch, list[Tensor], torch.cuda.Event | None]:
        # Micro-batch by micro-batch, as without this: another batch size would round differently.
        captions = [part.captions for part in split(batch, parts)]
        if self._stream is None:
            return batch, [self._encode(c) for c in captions], None
        with torch.cuda.stream(self._stream):
            texts = [self._encode(c) for c in captions]
            return batch, texts, self._stream.record_event()
