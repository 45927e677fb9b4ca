"""How fast a loader reads and decodes here: one rank, as training would, without a model."""

import time
from collections import Counter
from dataclasses import dataclass

from data_pipeline.config import DataConfig
from data_pipeline.decode import DecodeMode
from data_pipeline.storage.base import Access
from data_pipeline.stream.loader import Loader

BATCH = 32
_GAUGES = ("queue_ready", "chunks_held", "bytes_held")
"""Counters of a present state, not sums."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Rates of one loader after its first batch (megabytes are those read from the store), and its counters."""

    mode: DecodeMode
    workers: int
    images_per_s: float
    mb_per_s: float
    counters: Counter[str]


def measure(
    url: str, *, mode: DecodeMode, workers: int, resolution: int, seconds: float, access: Access
) -> Measurement:
    """Read batches for some seconds; opening the index and the first batch do not count."""
    cfg = DataConfig(
        url=url, decode=mode, workers=workers, anonymous=access.anonymous, requester_pays=access.requester_pays
    )
    loader = Loader(cfg, resolution=resolution, seed=0, global_batch=BATCH, rank=0, world=1, start=0)
    try:
        batches = iter(loader)
        next(batches)
        before, start = loader.counters, time.perf_counter()
        images, passed = 0, 0.0
        while passed < seconds:
            images += len(next(batches).sample_ids)
            passed = time.perf_counter() - start
        counters = Counter({n: v - (0 if n in _GAUGES else before[n]) for n, v in loader.counters.items()})
    finally:
        loader.close()
    return Measurement(mode, workers, images / passed, counters["bytes"] / passed / 1e6, counters)
