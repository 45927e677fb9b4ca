"""Batches of one rank: chunks fetched ahead, samples decoded by workers, bad samples replaced and counted."""

import functools
import json
import multiprocessing
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.captions import PREFIXES, choose_caption, parse_captions, parse_label, texts_of
from data_pipeline.config import DataConfig
from data_pipeline.decode import DecodeError, decode
from data_pipeline.errors import DataError
from data_pipeline.index.filter import select
from data_pipeline.index.format import BLOCK, Index, load_index
from data_pipeline.storage.base import Access, Store, open_store
from data_pipeline.storage.disk_cache import DiskCache
from data_pipeline.storage.retry import RetryBudget
from data_pipeline.stream.buckets import assign, bucket_sizes
from data_pipeline.stream.chunk_reader import ChunkReader, RawSample, Shelf
from data_pipeline.stream.mixture import MixedOrder, Place
from data_pipeline.stream.sampler import CHUNK_SAMPLES, ElasticOrder, generator
from data_pipeline.text_embeddings import StatesIdentity, TextStates, unpack_states

STATE_VERSION = 2
REPLACEMENTS = 8
"""Other samples tried in place of a bad one."""
RATE_AFTER = 1000
"""Samples seen before the rate of bad ones can stop a run."""
_REPLACE_KEY = 4


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures (B, Y, X, 3), a caption or a label each, their numbers in the run, and their text states."""

    images: Any
    captions: list[str]
    labels: list[int]
    numbers: list[int]
    states: list[Any] | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A decoded sample: caption or label, and the text's states (tokens, width) as bfloat16 bits."""

    pixels: Any
    target: str | int
    states: Any


class Loader:
    """Endless batches for one rank: rank ``rank`` of ``world`` takes every ``world``-th sample of each
    global batch, so the global batch is the same for any number of ranks.

    ``multiple`` is what heights and widths of buckets divide by. The state of the data is ``start``, the number of
    samples that the run has seen. ``text_identity`` is the text encoder's, which precomputed states must have.
    ``on_bad`` is told of each sample that could not be used, ``say`` what a person should know.
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
        on_bad: Callable[[dict[str, Any]], None] | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        if global_batch % world:
            raise ValueError(f"global_batch={global_batch} over {world} ranks")
        self._cfg, self._seed = cfg, seed
        self._global_batch, self._rank, self._world, self._start = global_batch, rank, world, start
        sizes = bucket_sizes(resolution, multiple=multiple, max_aspect=cfg.bucket_aspect)
        cache = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else None
        self._disk = DiskCache(cache, cfg.cache_bytes, warn=say) if cache else None
        sources = _open(cfg, cache, text_identity)
        self._stores = [source.store for source in sources]
        self._stores += [source.states.store for source in sources if source.states is not None]
        self.null_states = None if sources[0].states is None else sources[0].states.null
        self.shelves = _shelves(cfg, sources, sizes, resolution, seed)
        weights = [source.weight for source in cfg.sources]
        lengths = [sum(len(row[k].index) for row in self.shelves if k in row) for k in range(len(weights))]
        self._order = MixedOrder(
            [
                [(k, shelf.order, weights[k] * len(shelf.index) / lengths[k]) for k, shelf in row.items()]
                for row in self.shelves
            ],
            seed=seed,
            global_batch=global_batch,
            first=start,
            streams=cfg.streams,
        )
        self.digests = [
            "+".join(row[k].index.digest for row in self.shelves if k in row) for k in range(len(weights))
        ]
        self._reader = ChunkReader(fetchers=cfg.fetchers, buffer_bytes=cfg.buffer_bytes, cache=self._disk)
        self._samples = _SampleLoader(cfg, self._reader, self.shelves, seed=seed, on_bad=on_bad)
        self._ahead = max(cfg.ahead, global_batch // world)
        self._workers = ThreadPoolExecutor(cfg.workers, thread_name_prefix="decode") if cfg.workers else None
        self._waiting: deque[tuple[int, Place, Any]] = deque()
        _advise(cfg, self.shelves, world, say)

    @property
    def counters(self) -> Counter[str]:
        """Requests, bytes, faults, retries, cache hits, substitutions and queue depth on this rank so far."""
        total = self._reader.counters
        total.update(self._samples.counters)
        for store in self._stores:
            total.update(store.counters)
        if self._disk is not None:
            total.update(self._disk.counters)
        total["queue_ready"] = sum(future.done() for _, _, future in list(self._waiting))
        return total

    def state(self, samples: int) -> dict[str, Any]:
        """Where the data stand after ``samples`` samples; ``epoch`` is that of the next sample's data set."""
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "epoch": self._order.at(samples).epoch,
            "samples": samples,
            "digests": self.digests,
            "streams": self._cfg.streams,
            "window": self._cfg.window,
            "weights": [source.weight for source in self._cfg.sources],
        }

    def __iter__(self) -> Iterator[Batch]:
        """Batches of ``global_batch / world`` samples, one per step."""
        numbers = self._numbers()
        size = self._global_batch // self._world
        while True:
            while len(self._waiting) < self._ahead:
                number = next(numbers)
                place = self._order.at(number)
                shelf = self.shelves[place.bucket][place.source]
                self._reader.prefetch(shelf, place.sample)
                self._waiting.append((number, place, self._start_loading(place)))
            taken = [self._waiting.popleft() for _ in range(size)]
            loaded = [future.result() for _, _, future in taken]
            yield Batch(
                images=np.stack([one.pixels for one in loaded]),
                captions=[one.target for one in loaded if isinstance(one.target, str)],
                labels=[one.target for one in loaded if isinstance(one.target, int)],
                numbers=[number for number, _, _ in taken],
                states=None if self.null_states is None else [one.states for one in loaded],
            )

    def close(self) -> None:
        """Stop workers and fetchers; a loader that was closed yields nothing more."""
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)
        self._samples.close()
        self._reader.close()

    def _start_loading(self, place: Place) -> Any:
        if self._workers is None:
            return _Later(lambda: self._samples.load(place))
        return self._workers.submit(self._samples.load, place)

    def _numbers(self) -> Iterator[int]:
        base = self._start
        while True:
            yield from range(base + self._rank, base + self._global_batch, self._world)
            base += self._global_batch


class _Later:
    """A future that is worked out where it is asked for."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result = work

    def done(self) -> bool:
        return False


class _SampleLoader:
    """Decodes single samples."""

    def __init__(
        self,
        cfg: DataConfig,
        reader: ChunkReader,
        shelves: list[dict[int, Shelf]],
        *,
        seed: int,
        on_bad: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._cfg, self._reader, self._shelves, self._seed, self._on_bad = cfg, reader, shelves, seed, on_bad
        context = multiprocessing.get_context("spawn")
        processes = cfg.worker_kind == "process" and cfg.workers
        self._processes = ProcessPoolExecutor(cfg.workers, mp_context=context) if processes else None
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter(decoded=0, substitutions=0)

    @property
    def counters(self) -> Counter[str]:
        with self._lock:
            return Counter(self._counters)

    def load(self, place: Place) -> _Loaded:
        """Pixels and caption or label; a bad sample is replaced by another that every layout chooses alike."""
        shelf = self._shelves[place.bucket][place.source]
        for attempt in range(1 + REPLACEMENTS):
            chosen = place.sample
            if attempt:
                random = generator(self._seed, _REPLACE_KEY, attempt, place.sample)
                chosen = int(random.integers(len(shelf.index)))
            raw = self._reader.sample(shelf, chosen)
            try:
                loaded = self._decode(shelf, raw, place.epoch, chosen)
            except DecodeError as error:
                self._bad(shelf, raw, error)
                continue
            with self._lock:
                self._counters["decoded"] += 1
            return loaded
        raise DataError(f"{shelf.store.url}: sample {place.sample} and {REPLACEMENTS} others are all unusable")

    def close(self) -> None:
        if self._processes is not None:
            self._processes.shutdown(wait=False, cancel_futures=True)

    def _decode(self, shelf: Shelf, raw: RawSample, epoch: int, sample: int) -> _Loaded:
        cfg, image = self._cfg, bytes(raw.data[raw.place.image])
        target, states = self._text(shelf, raw, epoch, sample)
        enlarge = cfg.small == "enlarge"
        work = functools.partial(
            decode, image, shelf.size, mode=cfg.decode, max_pixels=cfg.max_pixels, enlarge=enlarge
        )
        pixels = work() if self._processes is None else self._processes.submit(work).result()
        return _Loaded(pixels, target, states)

    def _text(self, shelf: Shelf, raw: RawSample, epoch: int, sample: int) -> tuple[str | int, Any]:
        """Caption of this epoch and its states, or the class number."""
        cfg, text = self._cfg, bytes(raw.data[raw.place.text])
        if cfg.target == "label":
            return parse_label(text), None
        fields = shelf.index.header["scan"]["caption_fields"]
        captions = parse_captions(text, is_json=raw.place.is_json, fields=fields)
        caption = choose_caption(
            captions,
            seed=self._seed,
            epoch=epoch,
            # The row, not the place in a selection: the same words whatever is filtered.
            sample=shelf.index.row(sample),
            prefix_probability=cfg.prefix_probability,
            short_words=cfg.short_caption_words,
        )
        if shelf.states is None:
            return caption, None
        identity = shelf.states.identity
        texts = texts_of(captions, prefixes=identity.prefixes, short_words=identity.short_words)
        assert raw.states is not None
        return caption, unpack_states(raw.states, texts.index(caption), identity.width)

    def _bad(self, shelf: Shelf, raw: RawSample, error: DecodeError) -> None:
        with self._lock:
            self._counters[f"bad_{error.kind}"] += 1
            self._counters["substitutions"] += 1
            bad, good = self._counters["substitutions"], self._counters["decoded"]
        entry = {
            "shard": shelf.index.shards[raw.place.shard].key,
            "key": tarfile.TarInfo.frombuf(bytes(raw.data[:BLOCK]), "utf-8", "replace").name,
            "offset": raw.place.start,
            "kind": error.kind,
            "error": str(error),
        }
        if self._on_bad:
            self._on_bad(entry)
        if bad + good >= RATE_AFTER and bad > self._cfg.max_bad_fraction * (bad + good):
            raise DataError(
                f"{bad} of {bad + good} samples were unusable, more than "
                f"data.max_bad_fraction={self._cfg.max_bad_fraction}; the last: {json.dumps(entry)}"
            )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A data set that was opened."""

    store: Store
    index: Index
    states: TextStates | None


def access_of(cfg: DataConfig) -> Access:
    """How the configured buckets are reached."""
    return Access(
        anonymous=cfg.anonymous,
        requester_pays=cfg.requester_pays,
        deadline_s=cfg.deadline_s,
        read_timeout_s=cfg.stall_s,
        connections=max(10, cfg.fetchers),
    )


def states_identity(cfg: DataConfig, encoder: dict[str, Any]) -> StatesIdentity:
    """What text states depend on: the encoder's side, and the texts that training may show."""
    prefixes = PREFIXES if cfg.prefix_probability else ()
    return StatesIdentity(**encoder, prefixes=prefixes, short_words=cfg.short_caption_words)


def _open(cfg: DataConfig, cache: Path | None, text_identity: dict[str, Any] | None) -> list[_Opened]:
    access, budget = access_of(cfg), RetryBudget()
    identity = None if text_identity is None else states_identity(cfg, text_identity)
    opened = []
    for source in cfg.sources:
        store = open_store(source.url, access, budget=budget)
        index = load_index(store, cache=cache)
        states = None
        if source.text_states:
            states = TextStates(open_store(source.text_states, access, budget=budget), index, identity)
        opened.append(_Opened(store, index, states))
    return opened


def _shelves(
    cfg: DataConfig, sources: list[_Opened], sizes: tuple[tuple[int, int], ...], resolution: int, seed: int
) -> list[dict[int, Shelf]]:
    """Per bucket that holds anything, the data sets' samples in it."""
    buckets: list[dict[int, Shelf]] = [{} for _ in sizes]
    for k, source in enumerate(sources):
        least = resolution if len(sizes) == 1 and cfg.small == "leave_out" else 0
        index = select(source.index, cfg.filters, target=cfg.target, min_side=least)
        parts = [index] if len(sizes) == 1 else _by_bucket(index, sizes)
        if not any(len(part) for part in parts):
            large = f"{resolution} pixels on its shorter side, " if cfg.small == "leave_out" else ""
            raise DataError(
                f"{source.store.url}: none of the {len(source.index)} samples has {large}a {cfg.target}, and "
                "passes data.filters"
            )
        for bucket, part in enumerate(parts):
            if len(part):
                order = ElasticOrder(part, seed=seed, streams=cfg.streams, window=cfg.window)
                buckets[bucket][k] = Shelf(source.store, part, order, sizes[bucket], source.states)
    return [row for row in buckets if row]


def _by_bucket(index: Index, sizes: tuple[tuple[int, int], ...]) -> list[Index]:
    rows = np.arange(len(index.columns["start"]), dtype=np.uint32) if index.rows is None else index.rows
    bucket = assign(index.column("height", 0, len(index)), index.column("width", 0, len(index)), sizes)
    return [index.only(rows[bucket == number]) for number in range(len(sizes))]


def _advise(cfg: DataConfig, shelves: list[dict[int, Shelf]], world: int, say: Callable[[str], None]) -> None:
    """Say so where the chunks that a rank reads at a time do not fit, since they are then read again and again."""
    if cfg.cache_dir:
        return
    for row in shelves:
        for shelf in row.values():
            chunk = sum(s.size for s in shelf.index.shards) / max(1, len(shelf.index.columns["start"]))
            live = min(
                len(shelf.chunks.first), -(-shelf.order.streams // world) * (cfg.window // CHUNK_SAMPLES + 1)
            )
            need = live * chunk * CHUNK_SAMPLES
            if need > 1.25 * cfg.buffer_bytes:
                say(
                    f"WARNING: {shelf.store.url}: a rank draws from about {need / 2**30:.1f} GiB of chunks at a "
                    f"time, data.buffer_bytes holds {cfg.buffer_bytes / 2**30:.1f}: chunks will be read more than "
                    "once. Lower data.streams or data.window, raise data.buffer_bytes, or set data.cache_dir"
                )
                return
