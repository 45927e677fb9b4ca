"""Elastic sampler: which sample stands at a position depends only on (index, seed, epoch, position).

Samples lie in chunks of up to 32 neighbours of a shard, one ranged read each. An epoch shuffles the chunks and
cuts the resulting line of samples into ``streams`` equal pieces; position p belongs to stream p mod streams,
so that a rank which owns some residues reads few chunks that others read too. Within a stream, samples
are shuffled in windows. No sample is left out or repeated within an epoch, whatever the numbers.

Data sets are mixed by weight, and aspect-ratio buckets take whole batches. All of it is fixed by the seed alone,
found in constant time, and the same for every number of ranks.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.index.format import BLOCK, Index

CHUNK_SAMPLES = 32
CHUNK_BYTES = 8 * 2**20
"""A chunk ends where its shard passes a multiple of this, so that one read stays of a good size."""
_SLICE = 4 * 2**20
BLOCK_POSITIONS = 1 << 12
"""Positions in which every source of a mixture gets its exact number of samples."""
_CHUNK_KEY, _WINDOW_KEY, _MIXTURE_KEY, _BUCKET_KEY = 1, 2, 6, 7
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


class Schedule:
    """Deals positions to sources in proportion to their weights.

    Every block of ``BLOCK_POSITIONS`` positions holds each source equally often (rounded by the largest
    remainder, at least once), in an order shuffled for that block. ``lanes`` deal independently.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, key: int, group: int, lanes: int) -> None:
        if not 0 < len(weights) <= BLOCK_POSITIONS or min(weights) <= 0:
            raise ValueError(f"weights {list(weights)} must be positive, at most {BLOCK_POSITIONS} of them")
        exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK_POSITIONS
        quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
        # Positions left over go to the largest remainders; where minimums took too many, the largest give.
        order = np.argsort(quotas - exact, kind="stable")
        while (left := BLOCK_POSITIONS - int(quotas.sum())) > 0:
            quotas[order[:left]] += 1
        while quotas.sum() > BLOCK_POSITIONS:
            quotas[np.argmax(quotas)] -= 1

        @functools.lru_cache(maxsize=2 * lanes)
        def deal(lane: int, block: int) -> tuple[Any, Any]:
            """Source of each position of a block, and how many before it in the block have the same."""
            sources = np.repeat(np.arange(len(quotas), dtype=np.uint16), quotas)
            sources = generator(seed, key, group << 32 | lane, block).permutation(sources)
            before = np.empty(BLOCK_POSITIONS, dtype=np.uint16)
            for source, quota in enumerate(quotas):
                before[sources == source] = np.arange(quota)
            return sources, before

        self.quotas, self._deal = quotas, deal

    def at(self, position: int, lane: int = 0) -> tuple[int, int]:
        """Source of a lane's position, and how many positions before it have the same source."""
        if len(self.quotas) == 1:
            return 0, position
        block, offset = divmod(position, BLOCK_POSITIONS)
        sources, before = self._deal(lane, block)
        source = int(sources[offset])
        return source, block * int(self.quotas[source]) + int(before[offset])


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample of the run: its bucket, its data set, and the epoch and sample there."""

    bucket: int
    source: int
    epoch: int
    sample: int


class MixtureSampler:
    """Sample ``sample_id`` of the run for mixed data sets and buckets.

    ``samplers[bucket]`` lists (source, sampler, weight) of what the bucket holds. All samples of a global batch
    come from one bucket; ``first`` is a sample id at which a global batch begins. Data sets are mixed stream by
    stream: stream c of the run takes from stream c of each data set, so that a rank reads few chunks that
    others read too.
    """

    def __init__(
        self,
        samplers: Sequence[Sequence[tuple[int, ElasticSampler, float]]],
        *,
        seed: int,
        global_batch: int,
        first: int,
        streams: int,
    ) -> None:
        self._samplers, self._streams = samplers, streams
        self._batch, self._offset = global_batch, first % global_batch
        shares = [sum(weight for _, _, weight in bucket) for bucket in samplers]
        self._buckets = Schedule(shares, seed=seed, key=_BUCKET_KEY, group=0, lanes=1)
        self._sources = [
            Schedule([w for _, _, w in bucket], seed=seed, key=_MIXTURE_KEY, group=number, lanes=streams)
            for number, bucket in enumerate(samplers)
        ]

    def at(self, sample_id: int) -> SampleRef:
        bucket, position = 0, sample_id
        if len(self._samplers) > 1:
            batch, offset = divmod(sample_id - self._offset, self._batch)
            bucket, earlier = self._buckets.at(batch)
            position = earlier * self._batch + offset
        turn, stream = divmod(position, self._streams)
        which, earlier = self._sources[bucket].at(turn, stream)
        source, sampler, _ = self._samplers[bucket][which]
        epoch, sample = sampler.at(earlier * self._streams + stream)
        return SampleRef(bucket, source, epoch, sample)
