"""The disk cache never serves a wrong byte, never grows past its cap, and never stops a run."""

import multiprocessing
import os
import resource
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.storage.disk_cache import PAUSE_S, TRAILER, DiskCache

LARGEST = 60_000


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.name != "ledger"]


def on_disk(folder: Path) -> int:
    total = 0
    for path in files(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def payload(key: str) -> bytes:
    """Bytes that a key stands for, of a size up to ``LARGEST``."""
    draw = np.random.default_rng(zlib.crc32(key.encode()))
    return draw.bytes(int(draw.integers(0, LARGEST - TRAILER.size)))


def no_fetch() -> bytes:
    raise AssertionError("fetched")


def test_round_trip(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**6)
    assert cache.get("a") is None
    for key in ("a", "", "s3://bucket/shard-1.tar:0-100", "\u00e9" * 500):
        assert cache.get_or(key, partial(payload, key)) == payload(key)
        assert cache.get_or(key, no_fetch) == payload(key)
    cache.put("empty", b"")
    cache.put("a", b"new")
    assert cache.get("empty") == b"" and DiskCache(tmp_path, 10**6).get("a") == b"new"
    assert cache.counters == {
        "cache_hits": 5, "cache_misses": 5, "cache_damaged": 0, "cache_evicted": 0, "cache_errors": 0,
    }  # fmt: skip


def test_damage_is_a_miss_and_is_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**6)
    data = np.random.default_rng(0).bytes(1000)
    size = len(data) + TRAILER.size
    cache.put("other", data)
    (other,) = files(tmp_path)

    def damaged(change: bytes) -> None:
        path.write_bytes(change)
        assert cache.get("key") is None and not path.exists()

    for place in [*range(0, size, 97), *range(len(data) - 1, size)]:
        cache.put("key", data)
        (path,) = set(files(tmp_path)) - {other}
        whole = path.read_bytes()
        damaged(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        damaged(whole[:place])
    damaged(whole + b"x")
    damaged(b"")
    # A sound entry under another key's name.
    damaged(other.read_bytes())
    assert cache.counters["cache_damaged"] == cache.counters["cache_misses"] > 40
    assert cache.get_or("key", lambda: data) == data and cache.get("key") == data


def test_least_recently_used_is_evicted_and_cap_holds(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10 * (1000 + TRAILER.size))
    for number in range(10):
        cache.put(str(number), bytes([number]) * 1000)
        time.sleep(0.002)
    assert cache.counters["cache_evicted"] == 0
    assert cache.get("0") and cache.get("3")
    cache.put("new", bytes(1000))
    gone = [number for number in range(10) if cache.get(str(number)) is None]
    assert gone == [1, 2] and cache.counters["cache_evicted"] == 2 and cache.get("new")
    for number in range(100):
        cache.put(f"more{number}", bytes(number * 10))
        assert on_disk(tmp_path) <= 10 * (1000 + TRAILER.size)


def hammer(folder: Path, limit: int, seed: int, results: "multiprocessing.Queue[tuple[int, int]]") -> None:
    """Random keys through one cache; reports wrong payloads and the counter of errors."""
    cache = DiskCache(folder, limit)
    draw = np.random.default_rng(seed)
    wrong = 0
    for key in map(str, draw.integers(0, 60, 400)):
        wrong += cache.get_or(key, partial(payload, key)) != payload(key)
    results.put((wrong, cache.counters["cache_errors"]))


def test_processes_share_a_cap(tmp_path: Path) -> None:
    limit, num_processes = 600_000, 3
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    processes = [
        spawn.Process(target=hammer, args=(tmp_path, limit, seed, results)) for seed in range(num_processes)
    ]
    for process in processes:
        process.start()
    largest_total = 0
    while any(process.is_alive() for process in processes):
        largest_total = max(largest_total, on_disk(tmp_path))
        time.sleep(0.001)
    for process in processes:
        process.join()
    assert [results.get() for _ in processes] == [(0, 0)] * num_processes
    assert limit / 2 < largest_total <= limit + num_processes * LARGEST
    assert limit / 2 < on_disk(tmp_path) <= limit


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 10**6)
    cache.put("key", b"data")
    (entry,) = files(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftovers = [entry.with_name(f".{entry.name}.{pid}-0.partial") for pid in (dead.pid, os.getpid(), "odd")]
    for path in leftovers:
        path.write_bytes(bytes(1000))
    DiskCache(tmp_path, 10**6)
    assert set(files(tmp_path)) == {entry, *leftovers[1:]}
    later = time.time() + 3700
    monkeypatch.setattr(time, "time", lambda: later)
    DiskCache(tmp_path, 10**6)
    assert files(tmp_path) == [entry] and cache.get("key") == b"data"


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Below a file nothing can be made, not even by root, who may write where mode 0500 forbids it."""
    (tmp_path / "file").write_bytes(b"")
    cache = DiskCache(tmp_path / "file" / "cache", 1000)
    for _ in range(3):
        assert cache.get_or("key", lambda: b"data") == b"data"
    (message,) = caplog.messages
    assert str(tmp_path / "file" / "cache") in message and "Not a directory" in message
    assert cache.counters["cache_errors"] >= 1 and cache.counters["cache_misses"] == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_still_serves(tmp_path: Path) -> None:
    DiskCache(tmp_path, 10**6).put("key", b"data")
    folders = [tmp_path, *(p for p in tmp_path.iterdir() if p.is_dir())]
    try:
        for path in folders:
            path.chmod(0o500)
        cache = DiskCache(tmp_path, 10**6)
        assert cache.get("key") == b"data" and cache.get_or("new", lambda: b"x") == b"x"
    finally:
        for path in folders:
            path.chmod(0o700)


def test_a_write_that_fails_halfway(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes stops the write as a full disk does: part of the bytes are there."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    cache = DiskCache(tmp_path, 10**9)
    cache.put("small", b"data")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        assert cache.get_or("key", lambda: bytes(4_000_000)) == bytes(4_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(files(tmp_path)) == 1 and cache.get("small") == b"data"
    assert cache.counters["cache_errors"] == 1 and len(caplog.messages) == 1 and "File too large" in caplog.text
    cache.put("key", b"while it is paused")
    assert cache.get("key") is None
    now += PAUSE_S
    cache.put("key", b"later")
    assert cache.get("key") == b"later" and cache.counters["cache_errors"] == 1


def test_an_entry_above_the_cap_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path, 1000)
    cache.put("key", bytes(1000))
    assert files(tmp_path) == [] and "1012 bytes exceeds the cap of 1000" in caplog.text
    with pytest.raises(ValueError, match="cache_bytes=0 must be at least 1"):
        DataConfig(url="x", cache_bytes=0)
