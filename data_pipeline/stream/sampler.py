"""Elastic sampler: which sample stands at a position depends only on (index, seed, epoch, position).

Samples lie in chunks of up to 32 neighbours of a shard, one ranged read each. An epoch shuffles the chunks and
cuts the resulting line of samples into ``streams`` equal pieces; position p belongs to stream p mod streams,
so that a rank which owns some residues reads few chunks that others read too. Within a stream, samples
are shuffled in windows. No sample is left out or repeated within an epoch, whatever the numbers.

Data sets are mixed by weight, and aspect-ratio buckets take whole batches. All of it is fixed by the seed alone,
found in constant time, and the same for every number of ranks.
"""

import functools
from typing import Any

import numpy as np

from data_pipeline.index.format import BLOCK, Index

CHUNK_SAMPLES = 32
CHUNK_BYTES = 8 * 2**20
"""A chunk ends where its shard passes a multiple of this, so that one read stays of a good size."""
_SLICE = 4 * 2**20
_CHUNK_KEY, _WINDOW_KEY = 1, 2
Ints = np.ndarray[Any, np.dtype[np.int64]]


def generator(seed: int, *key: int) -> np.random.Generator:
    """Counter-based generator keyed by the seed and up to three small integers."""
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(key)] = key
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


class Chunks:
    """Chunks of an index: sample numbers ``first[i] .. first[i] + size[i] - 1``, one shard each."""

    def __init__(self, index: Index) -> None:
        """Cut each shard's samples into chunks; a slice of samples at a time, for the sake of memory."""
        ends = index.sample_ends()
        shard_first = np.concatenate([[0], ends])
        firsts = []
        before: tuple[int, int, int] | None = None
        for low in range(0, len(index), _SLICE):
            high = min(len(index), low + _SLICE)
            samples = np.arange(low, high)
            shard = np.searchsorted(ends, samples, side="right")
            group = (samples - shard_first[shard]) // CHUNK_SAMPLES
            piece = index.column("start", low, high).astype(np.int64) // (CHUNK_BYTES // BLOCK)
            # A chunk begins wherever the shard, the group of samples or the piece of bytes changes.
            starts = np.ones(high - low, dtype=bool)
            starts[1:] = (np.diff(shard) != 0) | (np.diff(group) != 0) | (np.diff(piece) != 0)
            starts[0] = before != (int(shard[0]), int(group[0]), int(piece[0]))
            before = (int(shard[-1]), int(group[-1]), int(piece[-1]))
            firsts.append(samples[starts])
        self.first: Ints = np.concatenate(firsts).astype(np.int64)
        self.size: Ints = np.diff(self.first, append=len(index)).astype(np.int64)

    def of(self, sample: int) -> int:
        """Chunk that holds a sample."""
        return int(np.searchsorted(self.first, sample, side="right")) - 1


class ElasticSampler:
    """Endless order: the run's sample ``n`` is position ``n mod length`` of epoch ``n // length``.

    A position is found in constant time after one permutation of the epoch's chunks.
    """

    def __init__(self, index: Index, *, seed: int, streams: int, window: int) -> None:
        self.chunks = chunks = Chunks(index)
        self.length, self._window = len(index), window
        # A short set has fewer streams, so that each is long enough to be shuffled.
        self.streams = max(1, min(streams, self.length // window))

        @functools.lru_cache(maxsize=2)
        def line_of(epoch: int) -> tuple[Ints, Ints]:
            """First sample of each chunk, in the epoch's order, and the number of samples up to its end."""
            order = generator(seed, _CHUNK_KEY, epoch).permutation(len(chunks.first))
            return chunks.first[order], np.cumsum(chunks.size[order])

        @functools.lru_cache(maxsize=4 * self.streams)
        def shuffle(epoch: int, stream: int, window: int, size: int) -> Any:
            random = generator(seed, _WINDOW_KEY, epoch, stream << 32 | window)
            return random.permutation(size).astype(np.int32)

        self._line_of, self._shuffle = line_of, shuffle

    def at(self, sample_id: int) -> tuple[int, int]:
        """Epoch and sample for the run's sample ``sample_id``."""
        epoch, position = divmod(sample_id, self.length)
        turn, stream = divmod(position, self.streams)
        short, longer = divmod(self.length, self.streams)
        base = stream * short + min(stream, longer)
        length = short + (stream < longer)
        window, offset = divmod(turn, self._window)
        size = min(self._window, length - window * self._window)
        place = base + window * self._window + int(self._shuffle(epoch, stream, window, size)[offset])
        first, ends = self._line_of(epoch)
        chunk = int(np.searchsorted(ends, place, side="right"))
        before = int(ends[chunk - 1]) if chunk else 0
        return epoch, int(first[chunk]) + place - before
