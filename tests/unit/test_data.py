"""Index, order, mixtures, buckets, filters and the loader, on local files; S3 is in faults and end_to_end."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import DataConfig, Filters, Source
from data_pipeline.errors import DataError, Reject
from data_pipeline.index.build import ScanSettings, build_index, save_index
from data_pipeline.index.filter import select
from data_pipeline.index.format import COLUMNS, SCORE, Index, load_index, make_index
from data_pipeline.pack.readers import read_folder
from data_pipeline.pack.writer import pack
from data_pipeline.storage.base import ObjectInfo, open_store
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.mixture import BLOCK_POSITIONS, MixtureSampler, Schedule
from data_pipeline.stream.sampler import Chunks, ElasticSampler
from tests.assets import make_images_folder
from tests.sets import tar_of


def index_of(sizes: list[int], blocks: int = 1, **columns: Any) -> Index:
    """Shards of ``sizes`` samples of ``blocks`` tar blocks each."""
    total = sum(sizes)
    filled: dict[str, Any] = {name: np.zeros(total) for name in COLUMNS}
    filled |= {"height": np.full(total, 64), "width": np.full(total, 64), "length": np.full(total, blocks)}
    filled["start"] = np.concatenate([np.arange(size) * blocks for size in sizes])
    shards = [ObjectInfo(f"{i}.tar", 1, "") for i in range(len(sizes))]
    return make_index(shards, sizes, filled | columns)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 120), min_size=1, max_size=6).filter(any),
    blocks=st.sampled_from([1, 3000]),
    streams=st.integers(1, 40),
    window=st.integers(1, 80),
    seed=st.integers(0, 2**31),
    keep=st.floats(0.2, 1.0),
)
def test_every_epoch_is_a_permutation(
    sizes: list[int], blocks: int, streams: int, window: int, seed: int, keep: float
) -> None:
    whole = index_of(sizes, blocks)
    rows = np.flatnonzero(np.random.default_rng(seed).random(len(whole)) < keep)
    index = whole.only(rows) if len(rows) else whole
    order = ElasticSampler(index, seed=seed, streams=streams, window=window)
    count = len(index)
    epochs = [[order.at(e * count + p) for p in range(count)] for e in range(2)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(sample for _, sample in epoch) == list(range(count))
    # Constant-time seek: a fresh order gives the same sample anywhere.
    again = ElasticSampler(index, seed=seed, streams=streams, window=window)
    assert again.at(count + count // 2) == epochs[1][count // 2]
    # A chunk is one read: one shard, at most 32 samples, and no more than about 8 MiB.
    for first, size in zip(order.chunks.first.tolist(), order.chunks.size.tolist(), strict=True):
        shards = {index.locate(s).shard for s in range(first, first + size)}
        assert len(shards) == 1 and 1 <= size <= 32
        span = index.locate(first + size - 1).end - index.locate(first).start
        assert span <= 8 * 2**20 + 512 * blocks
        assert order.chunks.of(first) == order.chunks.of(first + size - 1)


def test_chunks_do_not_depend_on_how_many_samples_are_looked_at_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of([100, 7, 64, 0, 33], 900)
    wanted = Chunks.of_index(index)
    monkeypatch.setattr("data_pipeline.stream.sampler._SLICE", 17)
    found = Chunks.of_index(index)
    assert np.array_equal(found.first, wanted.first) and np.array_equal(found.size, wanted.size)


def test_order_depends_on_seed_and_epoch() -> None:
    index = index_of([500, 500])
    first = ElasticSampler(index, seed=1, streams=8, window=64)
    other = ElasticSampler(index, seed=2, streams=8, window=64)
    one = [first.at(p)[1] for p in range(1000)]
    assert one != [other.at(p)[1] for p in range(1000)]
    assert one != [first.at(1000 + p)[1] for p in range(1000)]
    assert np.corrcoef(one, np.arange(1000))[0, 1] < 0.2


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_schedules_give_each_source_its_exact_share(weights: list[float], seed: int) -> None:
    schedule = Schedule(weights, seed=seed, key=6, group=0, lanes=2)
    dealt = [schedule.at(p, 1) for p in range(2 * BLOCK_POSITIONS)]
    for source, weight in enumerate(weights):
        turns = [nth for which, nth in dealt if which == source]
        # Counted without gaps, so a source's own order is followed sample by sample.
        assert turns == list(range(len(turns)))
        wanted = max(2, 2 * BLOCK_POSITIONS * weight / sum(weights))
        assert abs(len(turns) - wanted) <= 2 + 2 * len(weights)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.sampled_from([6, 24]), first=st.integers(0, 50))
def test_buckets_fill_whole_batches_and_repeat_nothing_within_an_epoch(seed: int, batch: int, first: int) -> None:
    orders = [
        [(0, ElasticSampler(index_of([70]), seed=seed, streams=4, window=8), 0.7)],
        [
            (0, ElasticSampler(index_of([40]), seed=seed, streams=4, window=8), 0.2),
            (1, ElasticSampler(index_of([30]), seed=seed, streams=4, window=8), 0.1),
        ],
    ]
    mixed = MixtureSampler(orders, seed=seed, global_batch=batch, first=first, streams=4)
    seen: Counter[tuple[int, int, int, int]] = Counter()
    for b in range(40):
        places = [mixed.at(first + b * batch + i) for i in range(batch)]
        assert len({p.bucket for p in places}) == 1
        seen.update((p.bucket, p.source, p.epoch, p.sample) for p in places)
    assert set(seen.values()) == {1}
    # A resume at a later batch sees the same places.
    later = MixtureSampler(orders, seed=seed, global_batch=batch, first=first + 7 * batch, streams=4)
    assert all(later.at(first + 9 * batch + i) == mixed.at(first + 9 * batch + i) for i in range(batch))


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


def png(height: int = 48, width: int = 40, salt: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng([height, width, salt]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_set(folder: Path, members: dict[str, bytes], **scan: Any) -> str:
    """One shard and its index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s.tar").write_bytes(tar_of(members))
    store = open_store(str(folder))
    save_index(store, build_index(store, ScanSettings(**scan))[0])
    return str(folder)


def test_unusable_samples_duplicates_and_cut_shards_are_listed_by_name(tmp_path: Path) -> None:
    whole = tar_of({k: v for i in range(3) for k, v in ((f"{i}.png", png()), (f"{i}.txt", b"x"))})
    (tmp_path / "a.tar").write_bytes(
        tar_of(
            {
                "1.png": png(), "x/2.png": png(), "x/2.txt": b"two", "3.txt": b"x", "4.png": b"no", "4.txt": b"x",
                "5.png": png(), "5.txt": b" ", "6.png": png(), "6.json": b'{"caption": 3}',
            },
            {"x/2.png": png(), "x/2.txt": b"again"},
        )
    )  # fmt: skip
    (tmp_path / "b.tar").write_bytes(whole[: whole.rindex(b"2.txt")])
    (tmp_path / "c.tar").write_bytes(whole[:700])
    (tmp_path / "d.tar").write_bytes(b"")
    index, report = build_index(open_store(str(tmp_path)))
    text = "\n".join(report.problems)
    for part in (
        "a.tar: 1: no_caption", "a.tar: 3: no_image", "a.tar: 4: undecodable",
        "a.tar: 5: bad_caption", "a.tar: 6: bad_caption",
        "a.tar: x/2: duplicate: this key came before", "b.tar: ", "c.tar: ", "d.tar: ",
    ):  # fmt: skip
        assert part in text, part
    assert (
        index.ends.tolist()[0] == 1 and (tmp_path / "a.tar").read_bytes()[index.locate(0).start :][:5] == b"x/2.p"
    )
    assert index.ends[-1] - index.ends[1] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_an_index_is_made_again_only_for_what_changed(tmp_path: Path, workers: int) -> None:
    for name in "abc":
        members = {k: v for i in range(5) for k, v in ((f"{i}.png", png(salt=i)), (f"{i}.txt", name.encode()))}
        (tmp_path / f"{name}.tar").write_bytes(tar_of(members))
    store = open_store(str(tmp_path))
    index, report = build_index(store, workers=workers)
    assert report.reused == 0 and len(index) == 15
    save_index(store, index)
    (tmp_path / "d.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "b.tar").write_bytes(tar_of({"9.png": png(), "9.txt": b"new"}))
    index, report = build_index(store, workers=workers)
    assert report.reused == 2 and len(index) == 16
    fresh, report = build_index(store, workers=workers, fresh=True)
    assert report.reused == 0 and fresh.digest == index.digest
    assert build_index(store, ScanSettings(scores=("aesthetic",)))[1].reused == 0


def test_index_survives_the_disk_bit_by_bit_and_damage_is_found(tmp_path: Path) -> None:
    url = write_set(
        tmp_path / "s", {"1.png": png(), "1.txt": b"one", "2.png": png(33, 90), "2.json": b'{"text": "b"}'}
    )
    store = open_store(url)
    index = load_index(store)
    assert len(index) == 2 and index.columns["width"].tolist() == [40, 90]
    path = tmp_path / "s" / "index.safetensors"
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        raw = bytearray(whole)
        raw[random.integers(len(raw))] ^= 1 << random.integers(8)
        path.write_bytes(bytes(raw))
        with pytest.raises(DataError, match=r"index.safetensors (is damaged|has version)"):
            load_index(store)
        path.write_bytes(whole[: random.integers(1, len(whole))])
        with pytest.raises(DataError, match="is damaged"):
            load_index(store)


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


def test_filters_choose_from_the_index_alone(tmp_path: Path) -> None:
    def entry(i: int) -> bytes:
        fields = {"caption": "w" * (i + 1), "aesthetic": i / 10} if i != 3 else {"caption": "wwww"}
        return json.dumps(fields).encode()

    members: dict[str, bytes] = {}
    for i in range(10):
        members[f"{i}.png"] = png(32 + 4 * i, 64, salt=i)
        members[f"{i}.json"] = entry(i)
    index = load_index(open_store(write_set(tmp_path, members, scores=("aesthetic",))))
    assert np.isnan(index.columns[SCORE + "aesthetic"][3])

    def rows(min_side: int = 0, **filters: Any) -> list[int]:
        chosen = select(index, Filters(**filters), target="caption", min_side=min_side)
        assert (chosen.digest == index.digest) == (len(chosen) == 10)
        return list(range(10)) if chosen.rows is None else chosen.rows.tolist()

    assert rows() == list(range(10))
    assert rows(min_side=50) == [5, 6, 7, 8, 9]
    assert rows(min_scores={"aesthetic": 0.2}) == [2, 4, 5, 6, 7, 8, 9]
    assert rows(max_caption_chars=3) == [0, 1, 2] and rows(min_caption_chars=9) == [8, 9]
    assert rows(max_aspect=1.5) == [3, 4, 5, 6, 7, 8, 9] and rows(max_pixels=40 * 64) == [0, 1, 2]
    assert select(index, Filters(), target="label", min_side=0).rows is not None
    with pytest.raises(DataError, match=r"min_scores.other: the index has scores \['aesthetic'\]"):
        rows(min_scores={"other": 1.0})


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
