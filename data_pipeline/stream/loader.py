"""Batches of one rank: opens the data sets, prefetches chunks and decodes samples ahead by workers."""

import functools
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.captions import PREFIXES
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.index.filter import select
from data_pipeline.index.format import load_index
from data_pipeline.storage.base import Access, open_store
from data_pipeline.storage.disk_cache import DiskCache
from data_pipeline.storage.retry import RetryBudget
from data_pipeline.stream.buckets import assign, bucket_sizes
from data_pipeline.stream.chunk_reader import Buckets, BucketSource, ChunkReader
from data_pipeline.stream.mixture import MixtureSampler, SampleRef
from data_pipeline.stream.sample_decoder import DecodedSample, OnBad, SampleDecoder
from data_pipeline.stream.sampler import CHUNK_SAMPLES, ElasticSampler
from data_pipeline.text_embeddings import TextEmbeddingIdentity, TextEmbeddingStore

logger = logging.getLogger(__name__)

STATE_VERSION = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Images (B, Y, X, 3), a caption or a label each, their ids in the run, and their text embeddings."""

    images: Any
    captions: list[str]
    labels: list[int]
    sample_ids: list[int]
    text_embeddings: list[Any] | None


class Loader:
    """Endless batches for one rank: of each global batch, which is the same for any number of ranks, its share.

    Heights and widths of buckets are divisible by ``multiple``. ``start`` is the number of samples that the run
    has seen. ``text_identity`` is the text encoder's, which precomputed embeddings must have.
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        resolution: int,
        multiple: int = 16,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        start: int,
        text_identity: dict[str, Any] | None = None,
        on_bad: OnBad | None = None,
    ) -> None:
        if global_batch % world:
            raise ValueError(f"global_batch={global_batch} is not divisible by {world} ranks")
        self._cfg, self._seed = cfg, seed
        self._batch_size = global_batch // world
        # Ranks take turns, also from one global batch to the next.
        self._sample_ids = itertools.count(start + rank, world)

        cache_dir = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else None
        self._disk_cache = DiskCache(cache_dir, cfg.cache_bytes) if cache_dir else None
        sizes = bucket_sizes(resolution, multiple=multiple, max_aspect=cfg.bucket_aspect)
        self.buckets = _open_buckets(cfg, cache_dir, text_identity, sizes, seed)
        sources = [source for bucket in self.buckets for source in bucket.values()]
        embeddings = [source.text_embeddings for source in sources if source.text_embeddings is not None]
        self._stores = dict.fromkeys([*(source.store for source in sources), *(each.store for each in embeddings)])
        self.null_text_embedding = embeddings[0].null if embeddings else None
        digests = ([source.index.digest for source in _of(self.buckets, k)] for k in range(len(cfg.sources)))
        self.digests = ["+".join(each) for each in digests]
        self._sampler = _mixture(cfg, self.buckets, seed=seed, global_batch=global_batch, first=start)

        self._reader = ChunkReader(fetchers=cfg.fetchers, buffer_bytes=cfg.buffer_bytes, cache=self._disk_cache)
        self._decoder = SampleDecoder(cfg, self._reader, self.buckets, seed=seed, on_bad=on_bad)
        self._workers = ThreadPoolExecutor(cfg.workers, thread_name_prefix="decode") if cfg.workers else None
        self._queue: deque[tuple[int, Any]] = deque()
        if rank == 0:
            _warn_if_chunks_do_not_fit(cfg, self.buckets, world)

    @property
    def counters(self) -> Counter[str]:
        """Requests, bytes, faults, retries, cache hits, substitutions and queue depth on this rank so far."""
        counting: list[Any] = [self._reader, self._decoder, *self._stores]
        if self._disk_cache is not None:
            counting.append(self._disk_cache)
        total = Counter[str]()
        for part in counting:
            # A copy: another thread may add a counter.
            total.update(dict(part.counters))
        total["queue_ready"] = sum(future.done() for _, future in list(self._queue))
        return total

    def state(self, samples: int) -> dict[str, Any]:
        """The position after ``samples`` samples; ``epoch`` is that of the next sample's data set."""
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "epoch": self._sampler.at(samples).epoch,
            "samples": samples,
            "digests": self.digests,
            "streams": self._cfg.streams,
            "window": self._cfg.window,
            "weights": [source.weight for source in self._cfg.sources],
        }

    def __iter__(self) -> Iterator[Batch]:
        """Batches of ``global_batch / world`` samples, one per step."""
        while True:
            while len(self._queue) < max(self._cfg.ahead, self._batch_size):
                sample_id = next(self._sample_ids)
                self._queue.append((sample_id, self._start_loading(self._sampler.at(sample_id))))
            batch = [self._queue.popleft() for _ in range(self._batch_size)]
            samples = [future.result() for _, future in batch]
            yield Batch(
                images=np.stack([sample.pixels for sample in samples]),
                captions=[sample.target for sample in samples if isinstance(sample.target, str)],
                labels=[sample.target for sample in samples if isinstance(sample.target, int)],
                sample_ids=[sample_id for sample_id, _ in batch],
                text_embeddings=None if self.null_text_embedding is None else [s.text_embedding for s in samples],
            )

    def close(self) -> None:
        """Stop workers and fetchers; a closed loader yields nothing more."""
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self._reader.close()

    def _start_loading(self, ref: SampleRef) -> "Future[DecodedSample] | _Deferred":
        self._reader.prefetch(self.buckets[ref.bucket][ref.source], ref.sample)
        if self._workers is None:
            return _Deferred(functools.partial(self._decoder.load, ref))
        return self._workers.submit(self._decoder.load, ref)


@dataclass(frozen=True, slots=True)
class _Deferred:
    """A future that is computed where its result is asked for."""

    result: Callable[[], DecodedSample]

    def done(self) -> bool:
        return False


def access_of(cfg: DataConfig) -> Access:
    """How the configured buckets are reached."""
    return Access(
        anonymous=cfg.anonymous,
        requester_pays=cfg.requester_pays,
        deadline_s=cfg.deadline_s,
        read_timeout_s=cfg.stall_s,
        connections=max(10, cfg.fetchers),
    )


def text_embedding_identity(cfg: DataConfig, encoder: dict[str, Any]) -> TextEmbeddingIdentity:
    """What text embeddings depend on: the encoder's settings, and the texts that training may show."""
    prefixes = PREFIXES if cfg.prefix_probability else ()
    return TextEmbeddingIdentity(**encoder, prefixes=prefixes, short_words=cfg.short_caption_words)


def _open_buckets(
    cfg: DataConfig,
    cache: Path | None,
    text_identity: dict[str, Any] | None,
    sizes: tuple[tuple[int, int], ...],
    seed: int,
) -> Buckets:
    """Filtered samples by bucket; the first of ``sizes`` is the square. Raises where a data set has none."""
    access, budget = access_of(cfg), RetryBudget()
    identity = None if text_identity is None else text_embedding_identity(cfg, text_identity)
    drop, squares = cfg.small == "drop", len(sizes) == 1
    resolution, _ = sizes[0]
    buckets: Buckets = [{} for _ in sizes]
    for k, data in enumerate(cfg.sources):
        store, embeddings = open_store(data.url, access, budget=budget), None
        whole = load_index(store, cache=cache)
        if data.text_states:
            embeddings = TextEmbeddingStore(open_store(data.text_states, access, budget=budget), whole, identity)
        index = select(whole, cfg.filters, target=cfg.target, min_side=resolution if squares and drop else 0)
        parts = [index]
        if not squares:
            rows = np.arange(len(index), dtype=np.uint32) if index.rows is None else index.rows
            bucket_of = assign(index.column("height", 0, len(index)), index.column("width", 0, len(index)), sizes)
            parts = [index.only(rows[bucket_of == number]) for number in range(len(sizes))]
        if not any(len(part) for part in parts):
            large = f"{resolution} pixels on its shorter side, " if drop else ""
            raise DataError(
                f"{store.url}: none of the {len(whole)} samples has {large}a {cfg.target}, and passes data.filters"
            )
        for bucket, part, size in zip(buckets, parts, sizes, strict=True):
            if len(part):
                sampler = ElasticSampler(part, seed=seed, streams=cfg.streams, window=cfg.window)
                bucket[k] = BucketSource(store, part, sampler, size, embeddings)
    return [bucket for bucket in buckets if bucket]


def _of(buckets: Buckets, data_set: int) -> list[BucketSource]:
    """A data set's samples in each bucket that has any."""
    return [bucket[data_set] for bucket in buckets if data_set in bucket]


def _mixture(cfg: DataConfig, buckets: Buckets, *, seed: int, global_batch: int, first: int) -> MixtureSampler:
    """Data sets by weight; a bucket's share of a data set is its share of the samples."""
    weights = [source.weight for source in cfg.sources]
    lengths = [sum(len(source.index) for source in _of(buckets, k)) for k in range(len(weights))]
    samplers = [
        [(k, source.sampler, weights[k] * len(source.index) / lengths[k]) for k, source in bucket.items()]
        for bucket in buckets
    ]
    return MixtureSampler(samplers, seed=seed, global_batch=global_batch, first=first, streams=cfg.streams)


def _warn_if_chunks_do_not_fit(cfg: DataConfig, buckets: Buckets, world: int) -> None:
    """Chunks that a rank draws from at a time and cannot hold are read again and again."""
    if cfg.cache_dir:
        return
    for source in (source for bucket in buckets for source in bucket.values()):
        sample_bytes = sum(s.size for s in source.index.shards) / max(1, len(source.index.columns["start"]))
        streams = -(-source.sampler.streams // world)
        live = min(len(source.sampler.chunks.first), streams * (cfg.window // CHUNK_SAMPLES + 1))
        need = live * sample_bytes * CHUNK_SAMPLES
        if need > 1.25 * cfg.buffer_bytes:
            logger.warning(
                f"{source.store.url}: a rank reads from about {need / 2**30:.1f} GiB of chunks at a time, "
                f"data.buffer_bytes holds {cfg.buffer_bytes / 2**30:.1f}: chunks will be read more than once. "
                "Lower data.streams or data.window, raise data.buffer_bytes, or set data.cache_dir"
            )
            return
