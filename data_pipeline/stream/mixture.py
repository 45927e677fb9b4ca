"""Mixtures: which source gives the sample at each position, from the weights alone."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.stream.sampler import ElasticSampler, generator

_MIXTURE_KEY, _BUCKET_KEY = 6, 7
BLOCK_POSITIONS = 1 << 12
"""Positions in which every source of a mixture gets its exact number of samples."""


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
