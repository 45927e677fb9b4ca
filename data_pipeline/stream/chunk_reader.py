"""Chunks of samples, fetched ahead by threads, checked, kept in memory up to a number of bytes.

A chunk is one ranged read. Every sample in it is checked against the index; a chunk that was damaged on its
way is fetched again. With a disk cache, a chunk is fetched once for all processes of a node. Where text states
were computed before, those of the chunk's samples come with it.
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
from data_pipeline.stream.sampler import Chunks, ElasticOrder
from data_pipeline.text_embeddings import TextStates

CRC_ATTEMPTS = 12
"""Fetches of a chunk that does not match the index before that is believed."""


@dataclass(frozen=True)
class Shelf:
    """Samples of one data set and bucket, and their order. ``size`` is (height, width) of what they become."""

    store: Store
    index: Index
    order: ElasticOrder
    size: tuple[int, int]
    states: TextStates | None = None

    @property
    def chunks(self) -> Chunks:
        return self.order.chunks


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample's members with their tar headers (a view of its chunk), its place, and its text states' member."""

    data: memoryview
    place: Location
    states: bytes | None


@dataclass(frozen=True, slots=True)
class _Span:
    """A range of an object."""

    store: Store
    info: ObjectInfo
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What a fetch brings: bytes of the samples and of their states, from ``start`` and ``states_start`` on."""

    data: bytes
    start: int
    states: bytes
    states_start: int


class ChunkReader:
    """Reads samples of several shelves; safe to use from several threads."""

    def __init__(self, *, fetchers: int, buffer_bytes: int, cache: DiskCache | None) -> None:
        self._limit, self._cache = buffer_bytes, cache
        self._pool = ThreadPoolExecutor(fetchers, thread_name_prefix="fetch")
        self._held: OrderedDict[tuple[int, int], tuple[Future[_Chunk], int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter(crc_mismatch=0, chunks=0)

    @property
    def counters(self) -> Counter[str]:
        """Chunks fetched, checks failed, chunks held and bytes of them."""
        with self._lock:
            counted = Counter(self._counters)
            counted["chunks_held"], counted["bytes_held"] = len(self._held), self._bytes
        return counted

    def prefetch(self, shelf: Shelf, sample: int) -> None:
        """Start fetching the chunk of a sample if it is not here, nor on its way, and there is room for it."""
        self._start(shelf, shelf.chunks.of(sample), only_with_room=True)

    def sample(self, shelf: Shelf, sample: int) -> RawSample:
        """A sample, checked against the index."""
        future = self._start(shelf, shelf.chunks.of(sample))
        assert future is not None
        chunk, place = future.result(), shelf.index.locate(sample)
        states = None
        if shelf.states is not None:
            states = shelf.states.member(chunk.states, chunk.states_start, shelf.index.row(sample))
        return RawSample(
            memoryview(chunk.data)[place.start - chunk.start : place.end - chunk.start], place, states
        )

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, shelf: Shelf, chunk: int, *, only_with_room: bool = False) -> "Future[_Chunk] | None":
        key = (id(shelf), chunk)
        with self._lock:
            if key not in self._held:
                first = int(shelf.chunks.first[chunk])
                samples = range(first, first + int(shelf.chunks.size[chunk]))
                spans = _spans(shelf, samples)
                size = sum(span.end - span.start for span in spans)
                if not self._make_room(size) and only_with_room:
                    return None
                self._held[key] = (self._pool.submit(self._fetch, shelf, samples, spans), size)
                self._bytes += size
            self._held.move_to_end(key)
            return self._held[key][0]

    def _make_room(self, size: int) -> bool:
        """Let go of the chunks that were used longest ago; whether there is room now."""
        while self._bytes + size > self._limit and self._held:
            key, (future, held) = next(iter(self._held.items()))
            if not future.done():
                break
            del self._held[key]
            self._bytes -= held
        return self._bytes + size <= self._limit or not self._held

    def _fetch(self, shelf: Shelf, samples: range, spans: list[_Span]) -> _Chunk:
        places = [shelf.index.locate(n) for n in samples]
        pictures = spans[0]

        def whole(data: bytes) -> bool:
            # A view that the checksum takes; slices of bytes would copy the chunk.
            view = np.frombuffer(data, dtype=np.uint8)
            found = (view[p.start - pictures.start : p.end - pictures.start] for p in places)
            return all(google_crc32c.value(raw) == p.crc32c for raw, p in zip(found, places, strict=True))

        data = self._read(pictures, whole)
        if shelf.states is None:
            return _Chunk(data, pictures.start, b"", 0)
        sidecar, states, rows = spans[1], shelf.states, [shelf.index.row(n) for n in samples]
        members = self._read(
            sidecar, lambda found: all(states.member(found, sidecar.start, row) is not None for row in rows)
        )
        return _Chunk(data, pictures.start, members, sidecar.start)

    def _read(self, span: _Span, whole: Callable[[bytes], bool]) -> bytes:
        """A range whose content passes ``whole``; from the disk cache where there is one."""
        name = f"{span.store.url}/{span.info.key}"

        def read() -> bytes:
            for _ in range(CRC_ATTEMPTS):
                data = span.store.read(span.info.key, span.start, span.end - span.start, span.info.etag)
                if whole(data):
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


def _spans(shelf: Shelf, samples: range) -> list[_Span]:
    """What a chunk's fetch reads: of the shard, and of the sidecar with states."""
    first, last = shelf.index.locate(samples[0]), shelf.index.locate(samples[-1])
    spans = [_Span(shelf.store, shelf.index.shards[first.shard], first.start, last.end)]
    if shelf.states is not None:
        rows = [shelf.index.row(samples[0]), shelf.index.row(samples[-1])]
        spans.append(_Span(shelf.states.store, *shelf.states.span(first.shard, rows)))
    return spans
