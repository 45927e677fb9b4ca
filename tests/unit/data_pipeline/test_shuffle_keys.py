"""What an order is drawn from: each of its keys changes it, and the same keys give it again."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.captions import Captions, choose_caption
from data_pipeline.config import DataConfig, Source
from data_pipeline.index.build import build_index, save_index
from data_pipeline.index.format import COLUMNS, Index, make_index
from data_pipeline.storage.base import ObjectInfo, open_store
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.mixture import BLOCK_POSITIONS, MixtureSampler, Schedule
from data_pipeline.stream.sampler import CHUNK_SAMPLES, ElasticSampler, generator
from deco_scale.seeding import derive_seed
from deco_scale.training.noise import draw
from tests.support.sets import image_bytes, tar_of


def index_of(count: int) -> Index:
    """One shard of samples of a tar block."""
    columns: dict[str, Any] = {name: np.zeros(count) for name in COLUMNS}
    columns |= {"start": np.arange(count), "length": np.ones(count)}
    return make_index([ObjectInfo("0.tar", 1, "")], [count], columns)


def all_differ(*made: Any) -> None:
    for one, other in itertools.combinations(made, 2):
        assert one != other


def samples(count: int, *, seed: int = 0, epoch: int = 0, streams: int = 1, window: int = 1) -> list[int]:
    order = ElasticSampler(index_of(count), seed=seed, streams=streams, window=window)
    found = [order.at(epoch * count + position) for position in range(count)]
    assert {e for e, _ in found} == {epoch}
    return [sample for _, sample in found]


def test_each_key_of_a_generator_counts_and_so_does_its_place() -> None:
    keys = [(0,), (1,), (0, 1), (1, 1), (0, 0, 1), (1, 0, 1), (0, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
    drawn = {(seed, key): tuple(generator(seed, *key).integers(2**62, size=3)) for seed in (0, 1) for key in keys}
    assert len(set(drawn.values())) == len(drawn)
    assert all(drawn[seed, key] == tuple(generator(seed, *key).integers(2**62, size=3)) for seed, key in drawn)
    large = [(1 << 32 | 1,), (1 << 32,), (2 << 32,), (1,)]
    all_differ(*(tuple(generator(0, *key).integers(2**62, size=3)) for key in large))


def test_chunks_are_shuffled_by_seed_and_epoch() -> None:
    """With windows of one sample, only the chunks are: 32 of them, each in order."""
    count = 32 * CHUNK_SAMPLES
    made = [samples(count, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in made:
        assert all(b == a + 1 for a, b in zip(order, order[1:], strict=False) if b % CHUNK_SAMPLES)
    firsts = [[s // CHUNK_SAMPLES for s in order[::CHUNK_SAMPLES]] for order in made]
    assert all(sorted(each) == list(range(32)) != each for each in firsts)
    all_differ(*firsts)
    assert made[0] == samples(count)


def test_windows_are_shuffled_by_seed_and_epoch() -> None:
    """Of one chunk, which is one window."""
    made = [samples(CHUNK_SAMPLES, seed=s, epoch=e, window=CHUNK_SAMPLES) for s in (0, 1) for e in (0, 1, 2)]
    assert all(sorted(order) == list(range(CHUNK_SAMPLES)) != order for order in made)
    all_differ(*made)


def test_windows_of_a_stream_are_shuffled_each_by_itself() -> None:
    order = samples(4 * CHUNK_SAMPLES, window=CHUNK_SAMPLES)
    windows = [order[i : i + CHUNK_SAMPLES] for i in range(0, len(order), CHUNK_SAMPLES)]
    assert all(len({s // CHUNK_SAMPLES for s in window}) == 1 for window in windows)
    all_differ(*([s % CHUNK_SAMPLES for s in window] for window in windows))


def test_streams_are_shuffled_each_by_itself() -> None:
    order = samples(4 * CHUNK_SAMPLES, streams=4, window=CHUNK_SAMPLES)
    streams = [order[stream::4] for stream in range(4)]
    assert all(len({s // CHUNK_SAMPLES for s in stream}) == 1 for stream in streams)
    all_differ(*([s % CHUNK_SAMPLES for s in stream] for stream in streams))


def test_the_epochs_in_memory_are_distinguished() -> None:
    """Whatever epoch was asked for before."""
    order = ElasticSampler(index_of(64), seed=0, streams=2, window=16)
    for epoch in (0, 1, 5, 0, 2, 1, 0):
        found = [order.at(epoch * 64 + position) for position in range(64)]
        assert found == [(epoch, s) for s in samples(64, epoch=epoch, streams=2, window=16)]


def deal(block: int = 0, lane: int = 0, **changed: int) -> list[int]:
    keys = {"seed": 0, "key": 6, "group": 0, "lanes": 3} | changed
    schedule = Schedule([3.0, 1.0], **keys)
    return [schedule.at(block * BLOCK_POSITIONS + place, lane)[0] for place in range(BLOCK_POSITIONS)]


def test_each_block_of_a_mixture_is_shuffled_by_all_its_keys() -> None:
    changes: list[dict[str, int]] = [
        {}, {"block": 1}, {"block": 2}, {"lane": 1}, {"lane": 2}, {"seed": 1}, {"key": 7}, {"group": 1},
        {"group": 1, "lane": 1}, {"block": 1, "lane": 1}, {"block": 2, "group": 1},
    ]  # fmt: skip
    dealt = [deal(**change) for change in changes]
    all_differ(*dealt)
    assert dealt == [deal(**change) for change in changes]
    assert {sum(source == 0 for source in block) for block in dealt} == {3 * BLOCK_POSITIONS // 4}


def test_lanes_and_blocks_in_memory_are_distinguished() -> None:
    schedule = Schedule([1.0, 1.0], seed=0, key=6, group=0, lanes=2)
    for lane, block in itertools.product((0, 1, 0), (0, 3, 1, 0)):
        fresh = Schedule([1.0, 1.0], seed=0, key=6, group=0, lanes=2)
        places = range(block * BLOCK_POSITIONS, block * BLOCK_POSITIONS + 64)
        assert [schedule.at(p, lane) for p in places] == [fresh.at(p, lane) for p in places]


def sources_of(*, seed: int = 0, streams: int = 2) -> dict[int, list[tuple[int, int]]]:
    """(Number, source) of the first samples, by bucket, of two buckets of two equal data sets each."""
    order = ElasticSampler(index_of(4096), seed=0, streams=streams, window=8)
    orders = [[(0, order, 1.0), (1, order, 1.0)]] * 2
    mixed = MixtureSampler(orders, seed=seed, global_batch=4, first=0, streams=streams)
    found: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for number in range(4096):
        place = mixed.at(number)
        found[place.bucket].append((number, place.source))
    return found


def test_buckets_and_streams_have_schedules_of_their_own() -> None:
    found = sources_of()
    numbers = {bucket: [number // 4 for number, _ in entries[::4]] for bucket, entries in found.items()}
    by_stream = [[source for _, source in entries[stream::2]] for entries in found.values() for stream in (0, 1)]
    length = min(map(len, by_stream))
    all_differ(*(sources[:length] for sources in by_stream))
    # The order of buckets is none of those of data sets.
    buckets = [int(batch in set(numbers[1])) for batch in range(1024)]
    all_differ(buckets[:length], *(sources[:length] for sources in by_stream))
    assert sources_of() == found
    other = sources_of(seed=1)
    assert [n for n, _ in other[0]] != [n for n, _ in found[0]]
    assert [s for _, s in other[0]][:length] != [s for _, s in found[0]][:length]


def test_captions_are_drawn_by_seed_epoch_and_sample() -> None:
    weighted = Captions(tuple("abcdefgh"), tuple(map(float, range(1, 9))))
    plain = Captions(tuple("abcdefgh"), (1.0,) * 8)

    def chosen(captions: Captions, seed: int = 0, epoch: int = 0, first: int = 0) -> list[str]:
        keys = {"seed": seed, "epoch": epoch, "prefix_probability": 0.5, "short_words": 3}
        return [choose_caption(captions, sample=first + i, **keys) for i in range(64)]  # type: ignore[arg-type]

    for captions in (plain, weighted):
        all_differ(
            chosen(captions), chosen(captions, seed=1), chosen(captions, epoch=1), chosen(captions, first=64),
            chosen(captions, seed=1, epoch=1),
        )  # fmt: skip
        assert chosen(captions) == chosen(captions)


@pytest.mark.parametrize("keep", ["seed", "epoch", "sample"])
def test_each_key_alone_varies_a_caption(keep: str) -> None:
    captions = Captions(tuple("abcdefgh"), (1.0,) * 8)
    keys = [{"seed": 0, "epoch": 0, "sample": 0} | {keep: i} for i in range(64)]
    found = [choose_caption(captions, **key, prefix_probability=0.5, short_words=3) for key in keys]
    assert {text[-1] for text in found} == set("abcdefgh")
    assert 16 < sum(text.startswith(("A ", "An ", "This ")) for text in found) < 48


@pytest.fixture(scope="module")
def half_bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 samples whose images are whole at every second place only."""
    folder = tmp_path_factory.mktemp("half_bad")
    data = image_bytes(0, size=(16, 16))
    members: dict[str, bytes] = {}
    for i in range(64):
        members[f"{i:02d}.png"] = data if i % 2 else data[:60] + bytes(len(data) - 60)
        members[f"{i:02d}.txt"] = f"{i}".encode()
    (folder / "a.tar").write_bytes(tar_of(members))
    store = open_store(str(folder))
    save_index(store, build_index(store)[0])
    return folder


def replaced(folder: Path, *, seed: int = 0, rank: int = 0, world: int = 1) -> dict[int, str]:
    """By the number in the run, the captions of an epoch."""
    cfg = DataConfig(url=str(folder), streams=1, window=64, workers=0, prefix_probability=0.0)
    loader = Loader(cfg, resolution=16, multiple=8, seed=seed, global_batch=64, rank=rank, world=world, start=0)
    batch = next(iter(loader))
    loader.close()
    return dict(zip(batch.sample_ids, batch.captions, strict=True))


def test_bad_samples_are_replaced_by_others_that_no_rank_changes(half_bad: Path) -> None:
    found = replaced(half_bad)
    assert len(found) == 64 and all(int(text) % 2 for text in found.values())
    parts = [replaced(half_bad, rank=rank, world=2) for rank in range(2)]
    assert parts[0] | parts[1] == found and parts[0].keys().isdisjoint(parts[1])
    # Not all by the same one, and by others under another seed.
    order = samples(64, window=64)
    bad = {sample: found[number] for number, sample in enumerate(order) if sample % 2 == 0}
    assert len(bad) == 32 and len(set(bad.values())) > 8
    order = samples(64, seed=1, window=64)
    other = replaced(half_bad, seed=1)
    assert bad != {sample: other[number] for number, sample in enumerate(order) if sample % 2 == 0}


def test_mixed_data_sets_are_distinguished_by_url(tmp_path: Path) -> None:
    """Two sets of the same shards' names, sizes and tags, one after the other through one loader."""
    for name in ("one", "two"):
        members: dict[str, bytes] = {}
        for i in range(8):
            members |= {f"{i}.png": image_bytes(0, size=(16, 16)), f"{i}.txt": f"{name} {i}".encode()}
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_bytes(tar_of(members))
        store = open_store(str(tmp_path / name))
        save_index(store, build_index(store)[0])
    sources = tuple(Source(url=str(tmp_path / name)) for name in ("one", "two"))
    cfg = DataConfig(mixture=sources, streams=1, window=4, workers=0, prefix_probability=0.0)
    loader = Loader(cfg, resolution=16, multiple=8, seed=0, global_batch=64, rank=0, world=1, start=0)
    found = next(iter(loader)).captions
    loader.close()
    assert set(found) == {f"{name} {i}" for name in ("one", "two") for i in range(8)}


def test_every_part_of_a_mixed_key_counts_and_so_does_its_place() -> None:
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 2, 3), (3, 2, 1)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_draws_belong_to_seed_and_sample_and_to_no_rank() -> None:
    cpu = torch.device("cpu")
    whole = draw(0, [5, 6, 7, 8], (3, 4, 4), cpu)
    for name, values in whole._asdict().items():
        flat = [tuple(row.reshape(-1).tolist()) for row in values]
        all_differ(*flat)
        other = getattr(draw(1, [5, 6, 7, 8], (3, 4, 4), cpu), name)
        assert all(not torch.equal(a, b) for a, b in zip(values, other, strict=True)), name
        parts = [getattr(draw(0, numbers, (3, 4, 4), cpu), name) for numbers in ([5, 7], [8, 6])]
        assert torch.equal(torch.cat(parts), values[[0, 2, 3, 1]]), name
