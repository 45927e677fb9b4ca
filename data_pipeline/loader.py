"""Batches of one rank: chunks fetched ahead, samples decoded by workers, bad samples replaced and counted."""

import json
import multiprocessing
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from data_pipeline.captions import choose_caption, parse_captions, parse_label
from data_pipeline.decode import DecodeError, decode
from data_pipeline.errors import DataError
from data_pipeline.index import Index, load_index
from data_pipeline.order import ElasticOrder, generator
from data_pipeline.settings import DataConfig
from data_pipeline.store import Store, open_store

REPLACEMENTS = 8
"""Other samples tried in place of a bad one."""
RATE_AFTER = 1000
"""Samples seen before the rate of bad ones can stop a run."""
_REPLACE_KEY = 4


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures (B, Y, X, 3), a caption or a label each, and their numbers in the run."""

    images: Any
    captions: list[str]
    labels: list[int]
    numbers: list[int]


class ChunkReader:
    """Fetches chunks by a few threads and keeps the last ones in memory, up to a number of bytes."""

    def __init__(self, store: Store, index: Index, order: ElasticOrder, cfg: DataConfig) -> None:
        self._store, self._index, self._chunks = store, index, order.chunks
        self._limit = cfg.cache_bytes
        self._pool = ThreadPoolExecutor(cfg.fetchers, thread_name_prefix="fetch")
        self._futures: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.counters: Counter[str] = Counter()

    def prefetch(self, sample: int) -> "Future[bytes]":
        """Start fetching the chunk of a sample, if it is not here or on its way."""
        chunk = self._chunks.of(sample)
        with self._lock:
            future = self._futures.get(chunk)
            if future is None:
                start, end = self._range(chunk)
                future = self._pool.submit(self._fetch, chunk, start, end)
                self._futures[chunk] = future
                self._bytes += end - start
                self._evict()
            self._futures.move_to_end(chunk)
            return future

    def sample(self, sample: int) -> bytes:
        """Bytes of the sample's members, checked; a chunk that was damaged on its way is fetched again."""
        for attempt in range(2):
            future = self.prefetch(sample)
            base, _ = self._range(self._chunks.of(sample))
            columns = self._index.columns
            start, end = int(columns["start"][sample]), int(columns["end"][sample])
            raw = future.result()[start - base : end - base]
            if google_crc32c.value(raw) == int(columns["crc32c"][sample]):
                return raw
            self.counters["crc_mismatch"] += 1
            if attempt == 0:
                with self._lock:
                    if self._futures.pop(self._chunks.of(sample), None) is not None:
                        first, last = self._range(self._chunks.of(sample))
                        self._bytes -= last - first
        shard = self._index.shards[int(columns["shard"][sample])]
        raise DataError(f"{self._store.url}/{shard.key}: bytes {start}-{end} differ from the index")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _range(self, chunk: int) -> tuple[int, int]:
        first = int(self._chunks.first[chunk])
        last = first + int(self._chunks.size[chunk]) - 1
        columns = self._index.columns
        return int(columns["start"][first]), int(columns["end"][last])

    def _fetch(self, chunk: int, start: int, end: int) -> bytes:
        shard = self._index.shards[int(self._index.columns["shard"][self._chunks.first[chunk]])]
        data = self._store.read(shard.key, start, end - start, shard.etag)
        self.counters["requests"] += 1
        self.counters["bytes"] += len(data)
        return data

    def _evict(self) -> None:
        while self._bytes > self._limit and len(self._futures) > 1:
            chunk, future = next(iter(self._futures.items()))
            if not future.done():
                break
            del self._futures[chunk]
            start, end = self._range(chunk)
            self._bytes -= end - start


class SampleLoader:
    """Decodes one sample of the run after another; see :class:`Loader`."""

    def __init__(
        self,
        store: Store,
        index: Index,
        cfg: DataConfig,
        *,
        seed: int,
        resolution: int,
        on_bad: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._index, self._cfg, self._seed, self._resolution = index, cfg, seed, resolution
        self._on_bad = on_bad
        self.order = ElasticOrder(index, seed=seed, streams=cfg.streams, window=cfg.window)
        self.reader = ChunkReader(store, index, self.order, cfg)
        self._processes = (
            ProcessPoolExecutor(cfg.workers, mp_context=multiprocessing.get_context("spawn"))
            if cfg.worker_kind == "process"
            else None
        )
        self._seen = 0

    def load(self, epoch: int, sample: int) -> tuple[Any, str | int]:
        """Pixels and caption or label; a bad sample is replaced by another that every layout chooses alike."""
        self._seen += 1
        for attempt in range(1 + REPLACEMENTS):
            chosen = sample
            if attempt:
                random = generator(self._seed, _REPLACE_KEY, attempt, sample)
                chosen = int(random.integers(len(self._index)))
            try:
                return self._load(epoch, chosen)
            except DecodeError as error:
                self._bad(chosen, error)
        raise DataError(f"sample {sample} and {REPLACEMENTS} replacements are all unusable")

    def close(self) -> None:
        self.reader.close()
        if self._processes is not None:
            self._processes.shutdown(wait=False, cancel_futures=True)

    def _load(self, epoch: int, sample: int) -> tuple[Any, str | int]:
        raw = self.reader.sample(sample)
        columns, cfg = self._index.columns, self._cfg
        base = int(columns["start"][sample])

        def member(name: str) -> bytes:
            start = int(columns[f"{name}_offset"][sample]) - base
            return raw[start : start + int(columns[f"{name}_size"][sample])]

        text = self._text(epoch, sample, member("text"))
        arguments = (member("image"), self._resolution, cfg.max_pixels)
        if self._processes is not None:
            return self._processes.submit(decode, *arguments).result(), text
        return decode(*arguments), text

    def _text(self, epoch: int, sample: int, raw: bytes) -> str | int:
        """Caption of this epoch, or the class number."""
        cfg = self._cfg
        if cfg.target == "label":
            return parse_label(raw)
        captions = parse_captions(raw, is_json=bool(self._index.columns["is_json"][sample]))
        return choose_caption(
            captions,
            seed=self._seed,
            epoch=epoch,
            sample=sample,
            prefix_probability=cfg.prefix_probability,
            short_words=cfg.short_caption_words,
        )

    def _bad(self, sample: int, error: DecodeError) -> None:
        counters = self.reader.counters
        counters[f"bad_{error.kind}"] += 1
        counters["substitutions"] += 1
        shard = self._index.shards[int(self._index.columns["shard"][sample])]
        entry = {
            "shard": shard.key,
            "offset": int(self._index.columns["start"][sample]),
            "kind": error.kind,
            "error": str(error),
        }
        if self._on_bad:
            self._on_bad(entry)
        if self._seen >= RATE_AFTER and counters["substitutions"] > self._cfg.max_bad_fraction * self._seen:
            raise DataError(
                f"{counters['substitutions']} of {self._seen} samples were unusable, more than "
                f"data.max_bad_fraction={self._cfg.max_bad_fraction}; the last: {json.dumps(entry)}"
            )


class Loader:
    """Endless batches for one rank: rank ``rank`` of ``world`` takes every ``world``-th sample of each
    global batch, so the global batch is the same for any number of ranks.

    The state of the data is ``start``, the number of samples that the run has seen.
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        resolution: int,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        start: int,
        on_bad: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if global_batch % world:
            raise ValueError(f"global_batch={global_batch} over {world} ranks")
        store = open_store(cfg.url)
        index = load_index(store).select(resolution)
        if not len(index):
            raise DataError(f"{cfg.url}: no sample has {resolution} pixels on its shorter side")
        # All that the order depends on besides the seed.
        self.digest = f"{index.digest}-{cfg.streams}-{cfg.window}"
        self._samples = SampleLoader(store, index, cfg, seed=seed, resolution=resolution, on_bad=on_bad)
        self._global_batch, self._rank, self._world = global_batch, rank, world
        self._start, self._ahead = start, max(cfg.ahead, global_batch // world)
        self._workers = ThreadPoolExecutor(cfg.workers, thread_name_prefix="decode")

    @property
    def counters(self) -> Counter[str]:
        """Requests, bytes, faults and substitutions so far on this rank."""
        return Counter(self._samples.reader.counters)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of ``global_batch / world`` samples, one per step."""
        numbers = self._numbers()
        waiting: deque[tuple[int, Future[tuple[Any, str | int]]]] = deque()
        while True:
            while len(waiting) < self._ahead:
                number = next(numbers)
                epoch, sample = self._samples.order.at(number)
                self._samples.reader.prefetch(sample)
                waiting.append((number, self._workers.submit(self._samples.load, epoch, sample)))
            size = self._global_batch // self._world
            taken = [waiting.popleft() for _ in range(size)]
            loaded = [future.result() for _, future in taken]
            yield Batch(
                images=np.stack([pixels for pixels, _ in loaded]),
                captions=[text for _, text in loaded if isinstance(text, str)],
                labels=[text for _, text in loaded if isinstance(text, int)],
                numbers=[number for number, _ in taken],
            )

    def close(self) -> None:
        """Stop workers and fetchers; a loader that was closed yields nothing more."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._samples.close()

    def _numbers(self) -> Iterator[int]:
        base = self._start
        while True:
            yield from range(base + self._rank, base + self._global_batch, self._world)
            base += self._global_batch
