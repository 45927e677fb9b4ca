"""Sampler and mixture: permutations, exact shares, whole batches of a bucket."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.index.format import COLUMNS, Index, make_index
from data_pipeline.storage.base import ObjectInfo
from data_pipeline.stream.mixture import BLOCK_POSITIONS, MixtureSampler, Schedule
from data_pipeline.stream.sampler import Chunks, ElasticSampler


def index_of(sizes: list[int], blocks: int = 1, **columns: Any) -> Index:
    """Shards of ``sizes`` samples of ``blocks`` tar blocks each."""
    total = sum(sizes)
    filled: dict[str, Any] = {name: np.zeros(total) for name in COLUMNS}
    filled |= {"height": np.full(total, 64), "width": np.full(total, 64), "length": np.full(total, blocks)}
    filled["start"] = np.concatenate([np.arange(size) * blocks for size in sizes])
    shards = [ObjectInfo(f"{i}.tar", 1, "") for i in range(len(sizes))]
    return make_index(shards, sizes, filled | columns)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 120), min_size=1, max_size=6).filter(any),
    blocks=st.sampled_from([1, 3000]),
    streams=st.integers(1, 40),
    window=st.integers(1, 80),
    seed=st.integers(0, 2**31),
    keep=st.floats(0.2, 1.0),
)
def test_every_epoch_is_a_permutation(
    sizes: list[int], blocks: int, streams: int, window: int, seed: int, keep: float
) -> None:
    whole = index_of(sizes, blocks)
    rows = np.flatnonzero(np.random.default_rng(seed).random(len(whole)) < keep)
    index = whole.only(rows) if len(rows) else whole
    order = ElasticSampler(index, seed=seed, streams=streams, window=window)
    count = len(index)
    epochs = [[order.at(e * count + p) for p in range(count)] for e in range(2)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(sample for _, sample in epoch) == list(range(count))
    # Constant-time seek: a fresh order gives the same sample anywhere.
    again = ElasticSampler(index, seed=seed, streams=streams, window=window)
    assert again.at(count + count // 2) == epochs[1][count // 2]
    # A chunk is one read: one shard, at most 32 samples, and no more than about 8 MiB.
    for first, size in zip(order.chunks.first.tolist(), order.chunks.size.tolist(), strict=True):
        shards = {index.locate(s).shard for s in range(first, first + size)}
        assert len(shards) == 1 and 1 <= size <= 32
        span = index.locate(first + size - 1).end - index.locate(first).start
        assert span <= 8 * 2**20 + 512 * blocks
        assert order.chunks.of(first) == order.chunks.of(first + size - 1)


def test_chunks_do_not_depend_on_how_many_samples_are_looked_at_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of([100, 7, 64, 0, 33], 900)
    expected = Chunks(index)
    monkeypatch.setattr("data_pipeline.stream.sampler._SLICE", 17)
    found = Chunks(index)
    assert np.array_equal(found.first, expected.first) and np.array_equal(found.size, expected.size)


def test_order_depends_on_seed_and_epoch() -> None:
    index = index_of([500, 500])
    first = ElasticSampler(index, seed=1, streams=8, window=64)
    other = ElasticSampler(index, seed=2, streams=8, window=64)
    one = [first.at(p)[1] for p in range(1000)]
    assert one != [other.at(p)[1] for p in range(1000)]
    assert one != [first.at(1000 + p)[1] for p in range(1000)]
    assert np.corrcoef(one, np.arange(1000))[0, 1] < 0.2


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_schedules_give_each_source_its_exact_share(weights: list[float], seed: int) -> None:
    schedule = Schedule(weights, seed=seed, key=6, group=0, lanes=2)
    dealt = [schedule.at(p, 1) for p in range(2 * BLOCK_POSITIONS)]
    for source, weight in enumerate(weights):
        turns = [nth for which, nth in dealt if which == source]
        # Counted without gaps, so a source's own order is followed sample by sample.
        assert turns == list(range(len(turns)))
        expected = max(2, 2 * BLOCK_POSITIONS * weight / sum(weights))
        assert abs(len(turns) - expected) <= 2 + 2 * len(weights)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.sampled_from([6, 24]), first=st.integers(0, 50))
def test_buckets_fill_whole_batches_and_repeat_nothing_within_an_epoch(seed: int, batch: int, first: int) -> None:
    samplers = [
        [(0, ElasticSampler(index_of([70]), seed=seed, streams=4, window=8), 0.7)],
        [
            (0, ElasticSampler(index_of([40]), seed=seed, streams=4, window=8), 0.2),
            (1, ElasticSampler(index_of([30]), seed=seed, streams=4, window=8), 0.1),
        ],
    ]
    mixed = MixtureSampler(samplers, seed=seed, global_batch=batch, first=first, streams=4)
    seen: Counter[tuple[int, int, int, int]] = Counter()
    for b in range(40):
        refs = [mixed.at(first + b * batch + i) for i in range(batch)]
        assert len({p.bucket for p in refs}) == 1
        seen.update((p.bucket, p.source, p.epoch, p.sample) for p in refs)
    assert set(seen.values()) == {1}
    # A resume at a later batch sees the same samples.
    later = MixtureSampler(samplers, seed=seed, global_batch=batch, first=first + 7 * batch, streams=4)
    assert all(later.at(first + 9 * batch + i) == mixed.at(first + 9 * batch + i) for i in range(batch))
