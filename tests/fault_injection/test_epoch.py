"""A whole epoch through a faulty network arrives complete, exact and in the same order, in bounded time."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.index.build import build_index, save_index
from data_pipeline.storage.base import open_store
from data_pipeline.storage.dev_server import S3Server, running_server
from data_pipeline.stream.loader import Loader
from tests.support.proxy import FaultProxy
from tests.support.sets import tar_of

SAMPLES, SHARDS, BATCH = 5000, 5, 100
BOUND_S = 120.0
"""A fault-free epoch takes seconds; with faults there are some fifty waits of at most a second or two."""
Epoch = dict[int, tuple[int, str]]
"""Checksum of the pixels and the caption, by number."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_server(tmp_path_factory.mktemp("s3")) as started:
        started.create_bucket("epoch")
        yield started
        # Stopping it in order takes ten seconds.
        started.kill()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of small images, each with a caption of its own, and their index."""
    folder = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        members: dict[str, bytes] = {}
        for i in range(SAMPLES // SHARDS):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
            members[f"{i:04d}.png"] = buffer.getvalue()
            members[f"{i:04d}.txt"] = f"sample {shard} {i}".encode()
        (folder / f"{shard}.tar").write_bytes(tar_of(members))
    store = open_store(str(folder))
    index, _ = build_index(store)
    assert not index.problems and len(index) == SAMPLES
    save_index(store, index)
    return folder


@pytest.fixture(scope="module")
def uploaded(server: S3Server, source: Path) -> str:
    """The same shards in S3, with an index of their own."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        store = open_store("s3://epoch/set")
        for path in sorted(source.glob("*.tar")):
            store.write_file(path.name, path)
        save_index(store, build_index(store)[0])
    return "s3://epoch/set"


@pytest.fixture(scope="module")
def wanted(source: Path) -> Epoch:
    return read_epoch(str(source))[0]


def read_epoch(url: str, on_batch: Callable[[int], None] = lambda step: None) -> tuple[Epoch, dict[str, int]]:
    cfg = DataConfig(url=url, streams=4, window=64, ahead=300, stall_s=1.0, deadline_s=90.0, prefix_probability=0)
    loader = Loader(cfg, resolution=16, seed=3, global_batch=BATCH, rank=0, world=1, start=0)
    found: Epoch = {}
    batches = iter(loader)
    for step in range(SAMPLES // BATCH):
        batch = next(batches)
        for number, pixels, caption in zip(batch.sample_ids, batch.images, batch.captions, strict=True):
            found[number] = (google_crc32c.value(pixels.tobytes()), caption)
        on_batch(step)
    counters = dict(loader.counters)
    loader.close()
    return found, counters


@pytest.mark.parametrize(
    ("kind", "counter"),
    [
        ("503", "fault_503"),
        ("reset", "fault_reset"),
        ("stall", "fault_stall"),
        ("truncate", "fault_truncated"),
        ("flip", "crc_mismatch"),
        ("latency", "chunks"),
    ],
)
def test_an_epoch_with_each_fault(
    server: S3Server, uploaded: str, wanted: Epoch, monkeypatch: pytest.MonkeyPatch, kind: str, counter: str
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with FaultProxy(("127.0.0.1", server.port), {kind: 0.3}, seed=11) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.endpoint)
        found, counters = read_epoch(uploaded)
    seconds = time.monotonic() - began
    print(f"{kind}: {between.injected[kind]} faults, {counters['requests']} requests, {seconds:.1f} s")
    assert len(found) == SAMPLES and len({caption for _, caption in found.values()}) == SAMPLES
    assert found == wanted
    assert between.injected[kind] > 20
    # Reads ahead into the next epoch may have been under way at the end.
    assert kind == "latency" or counters[counter] >= between.injected[kind] - 8
    assert seconds < BOUND_S


def test_an_epoch_through_a_server_that_is_killed_and_restarted(
    server: S3Server, uploaded: str, wanted: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    restarts: list[threading.Thread] = []

    def on_batch(step: int) -> None:
        if step in (5, 25):
            server.kill()
            restarts.append(threading.Thread(target=server.start))
            restarts[-1].start()

    began = time.monotonic()
    try:
        found, counters = read_epoch(uploaded, on_batch)
    finally:
        for restart in restarts:
            restart.join()
    assert found == wanted and counters["retries"] > 0
    assert time.monotonic() - began < BOUND_S
