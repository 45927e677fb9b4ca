"""The loader on local files: elastic, resumable, replaces bad samples; S3 is in faults and end_to_end."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, Source
from data_pipeline.errors import DataError, Reject
from data_pipeline.index.build import build_index, save_index
from data_pipeline.pack.readers import read_folder
from data_pipeline.pack.writer import pack
from data_pipeline.storage.base import open_store
from data_pipeline.stream.loader import Loader
from tests.support.assets import make_images_folder
from tests.support.sets import png, write_set


def batches(url: Path | str, world: int, *, start: int = 0, steps: int = 6, **extra: Any) -> list[dict[int, Any]]:
    """Global batches as {number: (pixels, caption)}, put together from all ranks."""
    settings = {"url": str(url), "streams": 4, "window": 16, "ahead": 16, "workers": 2, **extra}
    if "mixture" in settings:
        settings["url"] = ""
    cfg = DataConfig(**settings)
    loaders = [
        Loader(cfg, resolution=32, multiple=8, seed=5, global_batch=24, rank=r, world=world, start=start)
        for r in range(world)
    ]
    assert len({json.dumps(loader.state(start)) for loader in loaders}) == 1
    out: list[dict[int, Any]] = []
    iterators: list[Iterator[Any]] = [iter(loader) for loader in loaders]
    for _ in range(steps):
        merged: dict[int, Any] = {}
        for iterator in iterators:
            batch = next(iterator)
            for number, image, caption in zip(batch.sample_ids, batch.images, batch.captions, strict=True):
                assert number not in merged
                merged[number] = (image.shape, image.tobytes(), caption)
        out.append(merged)
    for loader in loaders:
        loader.close()
    return out


@pytest.mark.slow
def test_global_batches_of_three_epochs_do_not_depend_on_world_workers_or_resume(shards: Path) -> None:
    # 100 samples an epoch; 13 batches of 24 are three epochs and a bit.
    wanted = batches(shards, 1, steps=13)
    assert [sorted(b) for b in wanted] == [list(range(24 * i, 24 * i + 24)) for i in range(13)]
    for world in (1, 2, 3, 4, 8, 12):
        for workers in range(4):
            assert batches(shards, world, workers=workers, steps=13) == wanted
    assert batches(shards, 2, workers=1, fetchers=1, buffer_bytes=1, steps=13) == wanted


@settings(max_examples=8, deadline=None)
@given(stop=st.integers(0, 9), world=st.sampled_from([1, 2, 3, 4, 6, 8]), workers=st.integers(0, 3))
def test_a_run_resumed_anywhere_under_another_world_size_goes_on_alike(
    shards: Path, stop: int, world: int, workers: int
) -> None:
    wanted = batches(shards, 1, steps=11, workers=0)
    assert batches(shards, world, start=24 * stop, steps=2, workers=workers) == wanted[stop : stop + 2]


def test_mixtures_and_buckets_are_elastic_too(tmp_path: Path) -> None:
    urls = []
    for name, sizes in (("a", [(48, 48), (64, 40), (40, 64)]), ("b", [(50, 36), (33, 33)])):
        members: dict[str, bytes] = {}
        for i in range(60):
            members[f"{i}.png"] = png(*sizes[i % len(sizes)], salt=i)
            members[f"{i}.txt"] = f"{name} {i}".encode()
        urls.append(write_set(tmp_path / name, members))
    mixture = (Source(url=urls[0], weight=3.0), Source(url=urls[1], weight=1.0))
    for aspect in (1.0, 2.0):
        extra = {"mixture": mixture, "bucket_aspect": aspect, "prefix_probability": 0.0}
        wanted = batches("", 1, steps=10, **extra)
        for batch in wanted:
            assert len({shape for shape, _, _ in batch.values()}) == 1
        names = Counter(caption[0] for batch in wanted for _, _, caption in batch.values())
        assert 0.6 < names["a"] / sum(names.values()) < 0.9
        for world, workers in ((2, 0), (8, 2)):
            assert batches("", world, steps=10, workers=workers, **extra) == wanted
        assert batches("", 3, start=24 * 4, steps=3, **extra) == wanted[4:7]
    assert len({shape for batch in wanted for shape, _, _ in batch.values()}) > 1


def test_processes_and_a_disk_cache_give_the_same(shards: Path, tmp_path: Path) -> None:
    wanted = batches(shards, 1, steps=2)
    assert batches(shards, 1, steps=2, worker_kind="process") == wanted
    for _ in range(2):
        assert batches(shards, 2, steps=2, cache_dir=str(tmp_path / "cache")) == wanted


def test_changed_shard_stops_the_run_with_its_name(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "packed"))
    rejects: list[Reject] = []
    images = make_images_folder(tmp_path / "images", 6)
    pack(read_folder(images, rejects), store, shard_bytes=10**9, rejects=rejects)
    save_index(store, build_index(store)[0])
    shard = tmp_path / "packed" / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    cfg = DataConfig(url=str(tmp_path / "packed"))
    loader = Loader(cfg, resolution=16, seed=0, global_batch=2, rank=0, world=1, start=0)
    with pytest.raises(DataError, match=r"shard-00000.tar changed since it was indexed"):
        next(iter(loader))
    loader.close()


def test_bad_samples_are_replaced_alike_counted_and_quarantined(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(40):
        data = png()
        # A valid header, so that the index accepts it, and pixels that do not decode.
        members[f"{i}.png"] = data if i % 10 else data[:60] + bytes(len(data) - 60)
        members[f"{i}.txt"] = str(i).encode()
    url = write_set(tmp_path, members)

    def epoch(world: int) -> tuple[dict[int, str], list[dict[str, Any]]]:
        found: dict[int, str] = {}
        quarantined: list[dict[str, Any]] = []
        for rank in range(world):
            loader = Loader(
                DataConfig(url=url, prefix_probability=0.0),
                resolution=16, seed=0, global_batch=40, rank=rank, world=world, start=0,
                on_bad=quarantined.append,
            )  # fmt: skip
            batch = next(iter(loader))
            found |= dict(zip(batch.sample_ids, batch.captions, strict=True))
            assert loader.counters["substitutions"] >= len(batch.sample_ids) / 40
            loader.close()
        return found, quarantined

    found, quarantined = epoch(1)
    assert len(found) == 40 and not set(found.values()) & {"0", "10", "20", "30"}
    assert epoch(2)[0] == found
    assert {q["kind"] for q in quarantined} == {"undecodable"}
    assert {(q["shard"], q["key"]) for q in quarantined} == {("s.tar", f"{i}.png") for i in (0, 10, 20, 30)}


def test_a_loader_warns_when_chunks_do_not_fit(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = DataConfig(url=str(shards), buffer_bytes=1000)
    Loader(cfg, resolution=32, seed=0, global_batch=4, rank=0, world=1, start=0).close()
    assert len(caplog.messages) == 1 and "raise data.buffer_bytes" in caplog.text
