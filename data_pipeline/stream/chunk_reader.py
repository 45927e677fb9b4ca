"""Chunks of samples, prefetched by threads into a bounded memory buffer.

A chunk is one ranged read. Every sample in it is checked against the index; a damaged chunk is fetched again. With
a disk cache, a chunk is fetched once for all processes of a node. Precomputed text embeddings come with it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import google_crc32c
import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.index.format import Index, Location
from data_pipeline.storage.base import Counters, ObjectInfo, Store
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


class ChunkReader:
    """Reads samples of several buckets; safe to use from several threads."""

    def __init__(self, *, fetchers: int, buffer_bytes: int, cache: DiskCache | None) -> None:
        self._limit, self._cache = buffer_bytes, cache
        self._pool = ThreadPoolExecutor(fetchers, thread_name_prefix="fetch")
        self._cached: OrderedDict[tuple[int, int], tuple[Future[list[bytes]], list[_Span]]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._counters = Counters(crc_mismatch=0, chunks=0)

    @property
    def counters(self) -> dict[str, int]:
        """Chunks fetched, checks failed, chunks held and bytes of them."""
        return {**self._counters, "chunks_held": len(self._cached), "bytes_held": self._bytes}

    def prefetch(self, source: BucketSource, sample: int) -> None:
        """Start fetching the chunk of a sample if it is not here, nor on its way, and there is room for it."""
        self._start(source, source.sampler.chunks.of(sample), only_with_room=True)

    def sample(self, source: BucketSource, sample: int) -> RawSample:
        """A sample, checked against the index."""
        started = self._start(source, source.sampler.chunks.of(sample))
        assert started is not None
        (future, spans), location = started, source.index.locate(sample)
        pieces, member = future.result(), None
        if source.text_embeddings is not None:
            member = source.text_embeddings.member(pieces[1], spans[1].start, source.index.row(sample))
        start = spans[0].start
        return RawSample(memoryview(pieces[0])[location.start - start : location.end - start], location, member)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(
        self, source: BucketSource, chunk: int, *, only_with_room: bool = False
    ) -> "tuple[Future[list[bytes]], list[_Span]] | None":
        """What a chunk consists of, and where that lies."""
        key = (id(source), chunk)
        with self._lock:
            if key not in self._cached:
                chunks = source.sampler.chunks
                samples = range(chunks.first[chunk], chunks.first[chunk] + chunks.size[chunk])
                spans = _spans(source, samples)
                size = _size(spans)
                if not self._make_room(size) and only_with_room:
                    return None
                self._cached[key] = (self._pool.submit(self._fetch, source, samples, spans), spans)
                self._bytes += size
            self._cached.move_to_end(key)
            return self._cached[key]

    def _make_room(self, size: int) -> bool:
        """Evict the least recently used chunks; returns whether there is room now."""
        while self._bytes + size > self._limit and self._cached:
            key, (future, spans) = next(iter(self._cached.items()))
            if not future.done():
                break
            del self._cached[key]
            self._bytes -= _size(spans)
        return self._bytes + size <= self._limit or not self._cached

    def _fetch(self, source: BucketSource, samples: range, spans: list[_Span]) -> list[bytes]:
        """The samples and, where there are any, their text embeddings."""
        index, embeddings = source.index, source.text_embeddings

        def samples_intact(data: bytes) -> bool:
            # A view that the checksum takes; slices of bytes would copy the chunk.
            view, base = np.frombuffer(data, dtype=np.uint8), spans[0].start
            locations = map(index.locate, samples)
            return all(google_crc32c.value(view[at.start - base : at.end - base]) == at.crc32c for at in locations)

        def members_intact(data: bytes) -> bool:
            assert embeddings is not None
            return all(embeddings.member(data, spans[1].start, index.row(n)) is not None for n in samples)

        checks = (samples_intact, members_intact)
        return [self._read(span, intact) for span, intact in zip(spans, checks, strict=False)]

    def _read(self, span: _Span, is_intact: Callable[[bytes], bool]) -> bytes:
        """A range whose content passes ``is_intact``; from the disk cache where there is one."""
        name = f"{span.store.url}/{span.info.key}"

        def read() -> bytes:
            for _ in range(CRC_ATTEMPTS):
                data = span.store.read(span.info.key, span.start, span.end - span.start, span.info.etag)
                if is_intact(data):
                    return data
                self._counters.add(crc_mismatch=1)
            raise DataError(
                f"{name}: bytes {span.start}-{span.end} differ from the index after {CRC_ATTEMPTS} reads; the "
                "object is damaged: restore it, or make the index again without it"
            )

        self._counters.add(chunks=1)
        if self._cache is None:
            return read()
        return self._cache.get_or(f"{name} {span.info.etag} {span.start}-{span.end}", read)


def _size(spans: list[_Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _spans(source: BucketSource, samples: range) -> list[_Span]:
    """What a chunk's fetch reads: of the shard, and of the sidecar with text embeddings."""
    first, last = source.index.locate(samples[0]), source.index.locate(samples[-1])
    spans = [_Span(source.store, source.index.shards[first.shard], first.start, last.end)]
    if source.text_embeddings is not None:
        rows = [source.index.row(samples[0]), source.index.row(samples[-1])]
        embeddings = source.text_embeddings
        spans.append(_Span(embeddings.store, *embeddings.span(first.shard, rows)))
    return spans
