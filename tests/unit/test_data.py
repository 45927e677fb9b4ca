"""Data: order, packing, index, decoding, captions, loader. The S3 side is in end_to_end."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import cli
from data_pipeline.captions import PREFIXES, choose_caption, parse_captions
from data_pipeline.decode import DecodeError, decode
from data_pipeline.errors import DataError
from data_pipeline.index import _COLUMNS, Index, build_index, load_index, make_index, save_index
from data_pipeline.loader import Loader
from data_pipeline.order import ElasticOrder
from data_pipeline.pack import pack, read_folder, read_parquet
from data_pipeline.settings import DataConfig
from data_pipeline.store import ObjectInfo, open_store
from tests.assets import make_pictures_folder


def index_of(sizes: list[int]) -> Index:
    columns = {name: np.zeros(sum(sizes)) for name in _COLUMNS}
    columns["shard"] = np.repeat(np.arange(len(sizes)), sizes)
    return make_index(tuple(ObjectInfo(f"{i}.tar", 1, "") for i in range(len(sizes))), columns)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    streams=st.integers(1, 40),
    window=st.integers(1, 80),
    seed=st.integers(0, 2**31),
)
def test_every_epoch_is_a_permutation(sizes: list[int], streams: int, window: int, seed: int) -> None:
    index = index_of(sizes)
    order = ElasticOrder(index, seed=seed, streams=streams, window=window)
    count = len(index)
    epochs = [[order.at(e * count + p) for p in range(count)] for e in range(2)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(sample for _, sample in epoch) == list(range(count))
    # Constant-time seek: a fresh order gives the same sample anywhere.
    again = ElasticOrder(index, seed=seed, streams=streams, window=window)
    assert again.at(count + count // 2) == epochs[1][count // 2]


def test_order_depends_on_seed_and_epoch() -> None:
    index = index_of([500, 500])
    first = ElasticOrder(index, seed=1, streams=8, window=64)
    other = ElasticOrder(index, seed=2, streams=8, window=64)
    one = [first.at(p)[1] for p in range(1000)]
    assert one != [other.at(p)[1] for p in range(1000)]
    assert one != [first.at(1000 + p)[1] for p in range(1000)]
    assert np.corrcoef(one, np.arange(1000))[0, 1] < 0.2


def batches(url: Path, world: int, *, start: int = 0, steps: int = 6, **extra: Any) -> list[dict[int, Any]]:
    """Global batches as {number: (pixels, caption)}, put together from all ranks."""
    cfg = DataConfig(url=str(url), streams=4, window=16, ahead=16, **{"workers": 2, **extra})
    loaders = [
        Loader(cfg, resolution=32, seed=5, global_batch=24, rank=r, world=world, start=start) for r in range(world)
    ]
    out: list[dict[int, Any]] = []
    iterators: list[Iterator[Any]] = [iter(loader) for loader in loaders]
    for _ in range(steps):
        merged: dict[int, Any] = {}
        for iterator in iterators:
            batch = next(iterator)
            for number, image, caption in zip(batch.numbers, batch.images, batch.captions, strict=True):
                assert number not in merged
                merged[number] = (image.tobytes(), caption)
        out.append(merged)
    for loader in loaders:
        loader.close()
    return out


def test_global_batches_do_not_depend_on_world_workers_or_resume(shards: Path) -> None:
    wanted = batches(shards, 1)
    assert [sorted(b) for b in wanted] == [list(range(24 * i, 24 * i + 24)) for i in range(6)]
    for world in (2, 3, 4, 8):
        assert batches(shards, world) == wanted
    assert batches(shards, 2, workers=1, fetchers=1, cache_bytes=1) == wanted
    # 100 samples an epoch: the resumed part crosses into the second epoch.
    assert batches(shards, 3, start=72, steps=3) == wanted[3:]


def test_processes_decode_the_same(shards: Path) -> None:
    wanted = batches(shards, 1, steps=2)
    assert batches(shards, 1, steps=2, worker_kind="process") == wanted


def test_pack_index_and_webdataset_agree(shards: Path) -> None:
    import webdataset

    index = load_index(open_store(str(shards)))
    urls = [str(shards / s.key) for s in index.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(urls) > 1 and len(theirs) == len(index) == 100
    columns = index.columns
    for i in (0, 41, 99):
        raw = (shards / index.shards[columns["shard"][i]].key).read_bytes()
        start, size = int(columns["image_offset"][i]), int(columns["image_size"][i])
        assert raw[start : start + size] == theirs[i]["png"]
        start, size = int(columns["text_offset"][i]), int(columns["text_size"][i])
        assert raw[start : start + size] == theirs[i]["json" if columns["is_json"][i] else "txt"]


def png(side: int = 40) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side + 8, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_unusable_samples_and_cut_shards_are_listed_by_name(tmp_path: Path) -> None:
    whole = tar_of({k: v for i in range(3) for k, v in ((f"{i}.png", png()), (f"{i}.txt", b"x"))})
    (tmp_path / "a.tar").write_bytes(
        tar_of(
            {
                "1.png": png(),
                "2.png": png(),
                "2.txt": b"two",
                "3.txt": b"x",
                "4.png": b"no",
                "4.txt": b"x",
            }
        )
    )
    (tmp_path / "b.tar").write_bytes(whole[: whole.rindex(b"2.txt")])
    (tmp_path / "c.tar").write_bytes(whole[:700])
    index, report = build_index(open_store(str(tmp_path)))
    text = "\n".join(report.problems)
    for part in (
        "a.tar: /1: no caption",
        "a.tar: /3: no image",
        "a.tar: 4.png: not an image",
        "b.tar",
        "c.tar",
    ):
        assert part in text
    assert [int(s) for s in index.columns["shard"]].count(0) == 1
    assert not (index.columns["shard"] == 2).any()


def test_changed_shard_and_damaged_index_stop_the_run(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    skipped: list[str] = []
    pictures = make_pictures_folder(tmp_path / "pictures", 6)
    pack(read_folder(pictures, skipped), store, shard_bytes=10**9, skipped=skipped)
    save_index(store, build_index(store)[0])
    shard = tmp_path / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    loader = Loader(DataConfig(url=str(tmp_path)), resolution=16, seed=0, global_batch=2, rank=0, world=1, start=0)
    with pytest.raises(DataError, match=r"shard-00000.tar changed since it was indexed"):
        next(iter(loader))
    loader.close()
    raw = bytearray((tmp_path / "index.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "index.npz").write_bytes(bytes(raw))
    with pytest.raises(DataError, match="damaged"):
        load_index(store)


def test_bad_samples_are_replaced_alike_counted_and_quarantined(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(40):
        data = png()
        # A valid header, so that the index accepts it, and pixels that do not decode.
        members[f"{i}.png"] = data if i % 10 else data[:60] + bytes(len(data) - 60)
        members[f"{i}.txt"] = str(i).encode()
    (tmp_path / "s.tar").write_bytes(tar_of(members))
    store = open_store(str(tmp_path))
    save_index(store, build_index(store)[0])

    def epoch(world: int) -> tuple[dict[int, str], list[dict[str, Any]]]:
        found: dict[int, str] = {}
        quarantined: list[dict[str, Any]] = []
        for rank in range(world):
            loader = Loader(
                DataConfig(url=str(tmp_path), prefix_probability=0.0),
                resolution=16, seed=0, global_batch=40, rank=rank, world=world, start=0,
                on_bad=quarantined.append,
            )  # fmt: skip
            batch = next(iter(loader))
            found |= dict(zip(batch.numbers, batch.captions, strict=True))
            loader.close()
        return found, quarantined

    found, quarantined = epoch(1)
    assert len(found) == 40 and not set(found.values()) & {"0", "10", "20", "30"}
    assert epoch(2)[0] == found
    assert {q["kind"] for q in quarantined} == {"undecodable"} and quarantined[0]["shard"] == "s.tar"


def reference(image: Image.Image, side: int) -> Any:
    """The release's preprocessing, written out again."""
    image = image.convert("RGB")
    while min(*image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)  # type: ignore[arg-type]
    scale = side / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    pixels = np.array(image)
    y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[y : y + side, x : x + side]


@pytest.mark.parametrize("size", [(64, 64), (65, 90), (300, 130), (513, 256)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocessing_is_the_releases(size: tuple[int, int], mode: str) -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    found = decode(buffer.getvalue(), 64, 10**6)
    assert np.array_equal(found, reference(image, 64))


@pytest.mark.parametrize(
    ("data", "kind"),
    ids=["empty", "gif", "cut", "small"],
    argvalues=[
        (b"", "undecodable"),
        (b"GIF89a", "undecodable"),
        (png()[:800], "undecodable"),
        (png(20), "too_small"),
    ],
)
def test_faults_of_pictures_have_kinds(data: bytes, kind: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(data, 32, 10**6)
    assert caught.value.kind == kind


def test_picture_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(DecodeError) as caught:
        decode(png(2000), 32, 10**6)
    assert caught.value.kind == "too_large"


def test_captions() -> None:
    assert parse_captions(b" a cat\n", is_json=False) == ["a cat"]
    assert parse_captions(json.dumps({"caption": "x"}).encode(), is_json=True) == ["x"]
    for bad in (b"[]", b"{", json.dumps({"captions": [1]}).encode(), b"\xff"):
        with pytest.raises(DecodeError):
            parse_captions(bad, is_json=True)

    def choose(sample: int, epoch: int = 0, words: int = 30) -> str:
        return choose_caption(
            ["one", "two"], seed=1, epoch=epoch, sample=sample, prefix_probability=0.5, short_words=words
        )

    many = [choose(i) for i in range(400)]
    assert many == [choose(i) for i in range(400)] != [choose(i, epoch=1) for i in range(400)]
    prefixed = sum(c.startswith(PREFIXES) for c in many)
    assert 150 < prefixed < 250 and 150 < sum(c.endswith("one") for c in many) < 250
    assert not any(choose(i, words=1).startswith(PREFIXES) for i in range(50))


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"image": [png(), b"junk", png()], "caption": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "x.parquet")
    skipped: list[str] = []
    samples = list(read_parquet(tmp_path / "x.parquet", skipped))
    assert [s.captions for s in samples] == [["a"], ["c"]] and samples[0].suffix == "png"
    assert len(skipped) == 1 and "row 1" in skipped[0]
    pq.write_table(pa.table({"x": [1]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match="needs one of the columns"):
        list(read_parquet(tmp_path / "y.parquet", skipped))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = make_pictures_folder(tmp_path / "pictures", 5)
    (pictures / "lonely.png").write_bytes(png())
    assert cli.main(["pack", str(pictures), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "packed 5 samples" in out and "lonely.png: no .txt or .json" in out.replace("\n", "")
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    (tmp_path / "empty").mkdir()
    for url in (tmp_path / "empty", tmp_path / "nowhere", "gs://bucket/x"):
        assert cli.main(["inspect", str(url)]) == 1
        assert capsys.readouterr().err.startswith("deco-data: ")
