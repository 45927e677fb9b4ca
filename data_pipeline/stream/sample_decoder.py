"""One sample: read from its chunk and decoded; a bad one is counted, reported and replaced."""

import functools
import json
import multiprocessing
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from data_pipeline.captions import choose_caption, parse_captions, parse_label, texts_of
from data_pipeline.config import DataConfig
from data_pipeline.decode import DecodeError, decode
from data_pipeline.errors import DataError
from data_pipeline.index.format import BLOCK
from data_pipeline.storage.base import Counters
from data_pipeline.stream.chunk_reader import Buckets, BucketSource, ChunkReader, RawSample
from data_pipeline.stream.mixture import SampleRef
from data_pipeline.stream.sampler import generator
from data_pipeline.text_embeddings import unpack_embeddings

REPLACEMENTS = 8
"""Other samples tried in place of a bad one."""
RATE_AFTER = 1000
"""Samples seen before the rate of bad ones can stop a run."""
_REPLACE_KEY = 4
OnBad = Callable[[dict[str, Any]], None]
"""Called with each sample that could not be used."""


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """Pixels, caption or label, and the caption's embedding (tokens, width) as bfloat16 bits."""

    pixels: Any
    target: str | int
    text_embedding: Any


class SampleDecoder:
    """Reads and decodes single samples; a bad one is counted, reported and replaced."""

    def __init__(
        self, cfg: DataConfig, reader: ChunkReader, buckets: Buckets, *, seed: int, on_bad: OnBad | None
    ) -> None:
        self._cfg, self._reader, self._buckets, self._seed, self._on_bad = cfg, reader, buckets, seed, on_bad
        context = multiprocessing.get_context("spawn")
        processes = cfg.worker_kind == "process" and cfg.workers
        self._processes = ProcessPoolExecutor(cfg.workers, mp_context=context) if processes else None
        self.counters = Counters(decoded=0, substitutions=0)

    def load(self, ref: SampleRef) -> DecodedSample:
        """Pixels and caption or label; a bad sample is replaced by the same other one for any number of ranks."""
        source = self._buckets[ref.bucket][ref.source]
        for attempt in range(1 + REPLACEMENTS):
            sample = ref.sample
            if attempt:
                random = generator(self._seed, _REPLACE_KEY, attempt, ref.sample)
                sample = int(random.integers(len(source.index)))
            raw = self._reader.sample(source, sample)
            try:
                decoded = self._decode(source, raw, ref.epoch, sample)
            except DecodeError as error:
                self._reject(source, raw, error)
                continue
            self.counters.add(decoded=1)
            return decoded
        raise DataError(f"{source.store.url}: sample {ref.sample} and {REPLACEMENTS} others are all unusable")

    def close(self) -> None:
        if self._processes is not None:
            self._processes.shutdown(wait=False, cancel_futures=True)

    def _decode(self, source: BucketSource, raw: RawSample, epoch: int, sample: int) -> DecodedSample:
        cfg, image = self._cfg, bytes(raw.data[raw.location.image])
        target, text_embedding = self._text(source, raw, epoch, sample)
        limits: dict[str, Any] = {"max_pixels": cfg.max_pixels, "upscale": cfg.small == "upscale"}
        work = functools.partial(decode, image, source.size, mode=cfg.decode, **limits)
        pixels = work() if self._processes is None else self._processes.submit(work).result()
        return DecodedSample(pixels, target, text_embedding)

    def _text(self, source: BucketSource, raw: RawSample, epoch: int, sample: int) -> tuple[str | int, Any]:
        """Caption of this epoch and its embedding, or the class number."""
        cfg, text = self._cfg, bytes(raw.data[raw.location.text])
        if cfg.target == "label":
            return parse_label(text), None
        fields = source.index.header["scan"]["caption_fields"]
        captions = parse_captions(text, is_json=raw.location.is_json, fields=fields)
        caption = choose_caption(
            captions,
            seed=self._seed,
            epoch=epoch,
            # The row, not the position in a selection: the same words whatever is filtered.
            sample=source.index.row(sample),
            prefix_probability=cfg.prefix_probability,
            short_words=cfg.short_caption_words,
        )
        if source.text_embeddings is None:
            return caption, None
        identity = source.text_embeddings.identity
        texts = texts_of(captions, prefixes=identity.prefixes, short_words=identity.short_words)
        assert raw.text_embeddings is not None
        return caption, unpack_embeddings(raw.text_embeddings, texts.index(caption), identity.width)

    def _reject(self, source: BucketSource, raw: RawSample, error: DecodeError) -> None:
        self.counters.add(substitutions=1, **{f"bad_{error.kind}": 1})
        bad, good = self.counters["substitutions"], self.counters["decoded"]
        entry = {
            "shard": source.index.shards[raw.location.shard].key,
            "key": tarfile.TarInfo.frombuf(bytes(raw.data[:BLOCK]), "utf-8", "replace").name,
            "offset": raw.location.start,
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
