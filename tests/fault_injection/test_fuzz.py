"""Damaged shards and indexes: never a crash, a hang or unbounded memory; what is lost is listed.

Images are in tests/unit/data_pipeline/test_decode.py. 5,000 of each with ``-m long``.
"""

import io
import os
import tarfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.decode import DecodeError, decode
from data_pipeline.errors import DataError
from data_pipeline.index.build import ScanSettings, build_index, save_index, scan_shard
from data_pipeline.index.format import BLOCK, load_index
from data_pipeline.storage.base import open_store
from data_pipeline.stream.loader import Loader
from tests.support.sets import tar_of

COUNTS = [pytest.param(250, id="some"), pytest.param(5000, id="5000", marks=pytest.mark.long)]
SAMPLES = 12
SECONDS = 5.0
MEMORY_BYTES = 64 * 2**20
"""A scan holds four pieces of 8 MiB at most, and joins two of them."""


def shard(tar_format: int) -> bytes:
    random = np.random.default_rng(0)
    members: dict[str, bytes] = {}
    for i in range(SAMPLES):
        image = io.BytesIO()
        pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image, ("PNG", "JPEG", "WEBP")[i % 3])
        name = f"{'long/' * 40}{i}" if i == 5 else str(i)
        members[f"{name}.{('png', 'jpg', 'webp')[i % 3]}"] = image.getvalue()
        if i % 2:
            members[f"{name}.json"] = b'{"captions": ["a", "b"], "score": 1.5}'
        else:
            members[f"{name}.txt"] = b"a caption"
    return tar_of(members, tar_format=tar_format)


def mutated(whole: bytes, random: np.random.Generator) -> bytes:
    """Bits flipped, bytes set in headers, pieces cut out, repeated or moved."""
    raw = bytearray(whole)
    for _ in range(int(random.integers(1, 6))):
        kind, at = int(random.integers(6)), int(random.integers(len(raw)))
        if kind == 0:
            raw[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            # Somewhere in a header: sizes, checksums, types.
            header = at // BLOCK * BLOCK
            raw[min(len(raw) - 1, header + int(random.integers(BLOCK)))] = int(random.integers(256))
        elif kind == 2:
            del raw[at : at + int(random.integers(1, 3000))]
        elif kind == 3:
            raw[at:at] = raw[at : at + int(random.integers(1, 3000))]
        elif kind == 4:
            # A size field of twelve octal digits, with a checksum that fits.
            header = at // BLOCK * BLOCK
            raw[header + 124 : header + 136] = b"%011o\0" % int(random.integers(2**33))
            raw[header + 148 : header + 156] = b" " * 8
            raw[header + 148 : header + 156] = b"%06o\0 " % (sum(raw[header : header + BLOCK]) % 8**6)
        else:
            del raw[at:]
        if not raw:
            break
    return bytes(raw)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_shards(count: int, tmp_path: Path) -> None:
    store, random = open_store(str(tmp_path)), np.random.default_rng(1)
    wholes = [shard(f) for f in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    outcomes: Counter[str] = Counter()
    settings = ScanSettings(scores=("score",))
    tracemalloc.start()
    try:
        for number in range(count):
            raw = mutated(wholes[number % 3], random)
            (tmp_path / "s.tar").write_bytes(raw)
            (info,) = [i for i in store.list() if i.key == "s.tar"]
            tracemalloc.reset_peak()
            began = time.perf_counter()
            rows, problems = scan_shard(store, info, settings)
            assert time.perf_counter() - began < SECONDS
            assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
            # Nothing that is there vanishes without a word.
            if not problems:
                with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
                    assert len(rows["start"]) == len({member.name.rpartition(".")[0] for member in tar})
            outcomes["problems"] += len(problems)
            outcomes["samples"] += len(rows["start"])
            for row in range(len(rows["start"])):
                start = BLOCK * int(rows["start"][row]) + BLOCK * int(rows["image_at"][row])
                try:
                    decode(
                        raw[start : start + int(rows["image_size"][row])], (16, 16), mode="exact", max_pixels=10**6
                    )
                    outcomes["decoded"] += 1
                except DecodeError as error:
                    outcomes[error.kind] += 1
    finally:
        tracemalloc.stop()
    print(dict(outcomes))
    assert outcomes["problems"] > count / 4 and outcomes["decoded"] > count


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_indexes(count: int, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(shard(tarfile.USTAR_FORMAT))
    store, random = open_store(str(tmp_path)), np.random.default_rng(2)
    save_index(store, build_index(store, ScanSettings(scores=("score",)))[0])
    path = tmp_path / "index.safetensors"
    whole, digest = path.read_bytes(), load_index(store).digest
    refused = 0
    for _ in range(count):
        path.write_bytes(mutated(whole, random))
        began = time.perf_counter()
        try:
            # A mutation may undo itself.
            assert load_index(store).digest == digest and path.read_bytes() == whole
        except DataError:
            refused += 1
        assert time.perf_counter() - began < SECONDS
    assert refused > 0.99 * count


def test_a_shard_that_is_damaged_after_indexing_stops_the_run(tmp_path: Path) -> None:
    """Same size, other content, and a file system that keeps no times: the checksums find it."""
    path = tmp_path / "s.tar"
    path.write_bytes(shard(tarfile.USTAR_FORMAT))
    store = open_store(str(tmp_path))
    save_index(store, build_index(store)[0])
    stamp = path.stat()
    raw = bytearray(path.read_bytes())
    raw[700] ^= 1
    path.write_bytes(bytes(raw))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    loader = Loader(DataConfig(url=str(tmp_path)), resolution=16, seed=0, global_batch=2, rank=0, world=1, start=0)
    with pytest.raises(DataError, match=r"s.tar: bytes .* differ from the index"):
        next(iter(loader))
    loader.close()
