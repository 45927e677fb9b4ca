"""Chunks of samples, prefetched by threads into a bounded memory buffer.

A chunk is one ranged read. Every sample in it is checked against the index; a damaged chunk is fetched again. With
a disk cache, a chunk is fetched once for all processes of a node. Precomputed text embeddings come with it.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import google_crc32c
import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.index.format import Index, Location
from data_pipeline.storage.base import ObjectInfo, Store
from data_pipeline.storage.disk_cache import DiskCache
from data_pipeline.stream.sampler import ElasticSampler
from data_pipeline.text_embeddings import TextEmbeddingStore

CRC_ATTEMPTS = 12
"""Fetches of a chunk that does not match the index before that is believed."""


@dataclass(frozen=True)
class BucketSource:
    """Samples of one data set in one bucket, and their sampler; ``size`` is the bucket's (height, width)."""

    store: Store
    index: Index
    sampler: ElasticSampler
    size: tuple[int, int]
    text_embeddings: TextEmbeddingStore | None = None


Buckets = list[dict[int, BucketSource]]
"""For each bucket that is not empty, the samples of each data set (by its number) in it."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample's tar members (a view of its chunk), its location, and its text embeddings' member."""

    data: memoryview
    location: Location
    text_embeddings: bytes | None


@dataclass(frozen=True, slots=True)
class _Span:
    """A range of an object."""

    store: Store
    info: ObjectInfo
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes of the samples from ``start`` on, and of their text embeddings from ``embeddings_start`` on."""

    data: bytes
    start: int
    embeddings: bytes
    embeddings_start: int


class ChunkReader:
    """Reads samples of several buckets; safe to use from several threads."""

    def __init__(self, *, fetchers: int, buffer_bytes: int, cache: DiskCache | None) -> None:
        self._limit, self._cache = buffer_bytes, cache
        self._pool = ThreadPoolExecutor(fetchers, thread_name_prefix="fetch")
        self._cached: OrderedDict[tuple[int, int], tuple[Future[_Chunk], int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter(crc_mismatch=0, chunks=0)

    @property
    def counters(self) -> Counter[str]:
        """Chunks fetched, checks failed, chunks held and bytes of them."""
        with self._lock:
            counted = Counter(self._counters)
            counted["chunks_held"], counted["bytes_held"] = len(self._cached), self._bytes
        return counted

    def prefetch(self, source: BucketSource, sample: int) -> None:
        """Start fetching the chunk of a sample if it is not here, nor on its way, and there is room for it."""
        self._start(source, source.sampler.chunks.of(sample), only_with_room=True)

    def sample(self, source: BucketSource, sample: int) -> RawSample:
        """A sample, checked against the index."""
        future = self._start(source, source.sampler.chunks.of(sample))
        assert future is not None
        chunk, location = future.result(), source.index.locate(sample)
        member = None
        if source.text_embeddings is not None:
            row = source.index.row(sample)
            member = source.text_embeddings.member(chunk.embeddings, chunk.embeddings_start, row)
        data = memoryview(chunk.data)[location.start - chunk.start : location.end - chunk.start]
        return RawSample(data, location, member)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, source: BucketSource, chunk: int, *, only_with_room: bool = False) -> "Future[_Chunk] | None":
        key = (id(source), chunk)
        with self._lock:
            if key not in self._cached:
                chunks = source.sampler.chunks
                samples = range(chunks.first[chunk], chunks.first[chunk] + chunks.size[chunk])
                spans = _spans(source, samples)
                size = sum(span.end - span.start for span in spans)
                if not self._make_room(size) and only_with_room:
                    return None
                self._cached[key] = (self._pool.submit(self._fetch, source, samples, spans), size)
                self._bytes += size
            self._cached.move_to_end(key)
            return self._cached[key][0]

    def _make_room(self, size: int) -> bool:
        """Evict the least recently used chunks; returns whether there is room now."""
        while self._bytes + size > self._limit and self._cached:
            key, (future, num_bytes) = next(iter(self._cached.items()))
            if not future.done():
                break
            del self._cached[key]
            self._bytes -= num_bytes
        return self._bytes + size <= self._limit or not self._cached

    def _fetch(self, source: BucketSource, samples: range, spans: list[_Span]) -> _Chunk:
        locations, base = [source.index.locate(n) for n in samples], spans[0].start

        def samples_intact(data: bytes) -> bool:
            # A view that the checksum takes; slices of bytes would copy the chunk.
            view = np.frombuffer(data, dtype=np.uint8)
            return all(google_crc32c.value(view[at.start - base : at.end - base]) == at.crc32c for at in locations)

        data = self._read(spans[0], samples_intact)
        if (embeddings := source.text_embeddings) is None:
            return _Chunk(data, base, b"", 0)
        sidecar, rows = spans[1], [source.index.row(n) for n in samples]

        def members_intact(data: bytes) -> bool:
            return all(embeddings.member(data, sidecar.start, row) is not None for row in rows)

        return _Chunk(data, base, self._read(sidecar, members_intact), sidecar.start)

    def _read(self, span: _Span, is_intact: Callable[[bytes], bool]) -> bytes:
        """A range whose content passes ``is_intact``; from the disk cache where there is one."""
        name = f"{span.store.url}/{span.info.key}"

        def read() -> bytes:
            for _ in range(CRC_ATTEMPTS):
                data = span.store.read(span.info.key, span.start, span.end - span.start, span.info.etag)
                if is_intact(data):
                    return data
                self._count("crc_mismatch")
            raise DataError(
                f"{name}: bytes {span.start}-{span.end} differ from the index after {CRC_ATTEMPTS} reads; the "
                "object is damaged: restore it, or make the index again without it"
            )

        self._count("chunks")
        if self._cache is None:
            return read()
        return self._cache.get_or(f"{name} {span.info.etag} {span.start}-{span.end}", read)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counters[name] += 1


def _spans(source: BucketSource, samples: range) -> list[_Span]:
    """What a chunk's fetch reads: of the shard, and of the sidecar with text embeddings."""
    first, last = source.index.locate(samples[0]), source.index.locate(samples[-1])
    spans = [_Span(source.store, source.index.shards[first.shard], first.start, last.end)]
    if source.text_embeddings is not None:
        rows = [source.index.row(samples[0]), source.index.row(samples[-1])]
        embeddings = source.text_embeddings
        spans.append(_Span(embeddings.store, *embeddings.span(first.shard, rows)))
    return spans
