"""A loader that runs for days must not grow: 200,000 samples, resident memory after warm-up and at the end."""

import gc
import io
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.decode import DecodeMode
from data_pipeline.index.build import build_index, save_index
from data_pipeline.storage.base import open_store
from data_pipeline.stream.loader import Loader
from tests.support.sets import tar_of

SAMPLES, WARM, TOTAL, BATCH = 20_000, 40_000, 200_000, 500
GROWTH_BYTES = 24 * 2**20
"""Of some hundred MiB a process: what the allocator may still take while the buffer of chunks turns over."""


def resident_bytes() -> int:
    """Of this process and its workers."""
    process = psutil.Process()
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_memory_stays_flat_over_200_000_samples(tmp_path: Path, mode: DecodeMode) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    for shard in range(4):
        members: dict[str, bytes] = {}
        for i in range(SAMPLES // 4):
            members |= {f"{i}.png": buffer.getvalue(), f"{i}.txt": f"{shard} {i}".encode()}
        (tmp_path / f"{shard}.tar").write_bytes(tar_of(members))
    store = open_store(str(tmp_path))
    save_index(store, build_index(store)[0])
    # A buffer smaller than the set, so that chunks come and go; a disk cache smaller than it too.
    cfg = DataConfig(
        url=str(tmp_path), buffer_bytes=8 * 2**20, cache_dir=str(tmp_path / "cache"), cache_bytes=16 * 2**20,
        workers=2, ahead=1000, streams=8, window=256, decode=mode,
    )  # fmt: skip
    loader = Loader(cfg, resolution=16, seed=0, global_batch=BATCH, rank=0, world=1, start=0)
    batches, warm = iter(loader), 0
    for step in range(TOTAL // BATCH):
        next(batches)
        if (step + 1) * BATCH == WARM:
            gc.collect()
            warm = resident_bytes()
    gc.collect()
    end = resident_bytes()
    print(f"{warm / 2**20:.1f} MiB after {WARM:,} samples, {end / 2**20:.1f} MiB after {TOTAL:,}")
    loader.close()
    assert end - warm < GROWTH_BYTES
