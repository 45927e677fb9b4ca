"""What a cache gives back is what the store holds now: keys tell content, place and data set apart."""

import os
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.index.build import build_index, save_index
from data_pipeline.index.format import load_index
from data_pipeline.storage.base import LocalStore, open_store
from data_pipeline.storage.disk_cache import DiskCache
from data_pipeline.stream.loader import Loader
from tests.support.sets import image_bytes, tar_of

IMAGE = image_bytes(0, size=(16, 16))
COUNT = 40


def write_shard(path: Path, word: str, *, time_ns: int) -> None:
    """One image over and over, so that shards differ by captions alone: same size, same places."""
    members: dict[str, bytes] = {}
    for i in range(COUNT):
        members |= {f"{i:03d}.png": IMAGE, f"{i:03d}.txt": f"{word} {i:03d}".encode()}
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(tar_of(members))
    # The tag of a local file is its time and size.
    os.utime(path, ns=(time_ns, time_ns))


def index_set(folder: Path) -> None:
    store = open_store(str(folder))
    save_index(store, build_index(store, fresh=True)[0])


def captions(folder: Path, cache: Path, *, seed: int = 0, rank: int = 0, world: int = 1) -> tuple[set[str], int]:
    """Captions of an epoch, and how many chunks of it were in the cache."""
    cfg = DataConfig(
        url=str(folder), cache_dir=str(cache), streams=1, window=8, workers=0, ahead=1, prefix_probability=0.0
    )
    length = len(load_index(open_store(str(folder))))
    loader = Loader(
        cfg, resolution=16, multiple=8, seed=seed, global_batch=length, rank=rank, world=world, start=0
    )
    found = set(next(iter(loader)).captions)
    hits = loader.counters["cache_hits"]
    loader.close()
    return found, hits


def words(*texts: str) -> set[str]:
    return {f"{text} {i:03d}" for text in texts for i in range(COUNT)}


def test_a_shard_that_was_replaced_is_read_anew_though_the_cache_is_warm(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_shard(data / "a.tar", "old", time_ns=10**18)
    index_set(data)
    assert captions(data, cache) == (words("old"), 0)
    found, hits = captions(data, cache)
    assert found == words("old") and hits > 0
    size = (data / "a.tar").stat().st_size
    write_shard(data / "a.tar", "new", time_ns=10**18 + 10**9)
    assert (data / "a.tar").stat().st_size == size
    index_set(data)
    assert captions(data, cache) == (words("new"), 0)


def test_shards_of_a_set_and_sets_of_a_cache_are_distinguished(tmp_path: Path) -> None:
    """Of one size and one tag; only the key, or only the URL, differs."""
    for folder, shards in (("one", {"a": "1a", "b": "1b"}), ("two", {"a": "2a", "b": "2b"})):
        for shard, word in shards.items():
            write_shard(tmp_path / folder / f"{shard}.tar", word, time_ns=10**18)
        index_set(tmp_path / folder)
    for _ in range(2):
        assert captions(tmp_path / "one", tmp_path / "cache")[0] == words("1a", "1b")
        assert captions(tmp_path / "two", tmp_path / "cache")[0] == words("2a", "2b")


def test_every_rank_and_seed_shares_what_the_cache_holds(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_shard(data / "a.tar", "x", time_ns=10**18)
    index_set(data)
    captions(data, cache)
    parts = [captions(data, cache, seed=1, rank=rank, world=2) for rank in range(2)]
    assert all(hits > 0 and len(part) == COUNT // 2 for part, hits in parts)
    assert parts[0][0] | parts[1][0] == words("x") and not parts[0][0] & parts[1][0]


@pytest.mark.parametrize("keys", [("a", "b"), ("s 1 0-9", "s 2 0-9"), ("s 1 0-9", "s 1 9-18"), ("", " ")])
def test_keys_are_distinguished_even_where_their_files_are_swapped(keys: tuple[str, str], tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**6)
    paths: dict[str, Path] = {}
    for key in keys:
        before = set(tmp_path.glob("*/*"))
        cache.put(key, f"of {key}".encode())
        (paths[key],) = set(tmp_path.glob("*/*")) - before
    assert [cache.get(key) for key in keys] == [f"of {key}".encode() for key in keys]
    first, second = paths.values()
    first.write_bytes(second.read_bytes())
    assert cache.get(keys[0]) is None and cache.get(keys[1]) is not None


class FarStore(LocalStore):
    """A folder that is reached as a bucket is: its index has no path, so that it is copied to the cache."""

    def local_path(self, key: str) -> Path | None:
        return None


def test_a_copied_index_is_that_of_its_url_and_of_now(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def put(folder: str, width: int, time_ns: int) -> int:
        """Make a set of one image; returns the size of its index."""
        path = tmp_path / folder / "a.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tar_of({"1.png": image_bytes(0, size=(16, width)), "1.txt": b"x"}))
        os.utime(path, ns=(10**18, 10**18))
        index_set(path.parent)
        index = path.parent / "index.safetensors"
        os.utime(index, ns=(time_ns, time_ns))
        return index.stat().st_size

    def put_same_size(folder: str, widths: range, time_ns: int) -> int:
        """An index of the first one's size, so that the size tells nothing: checksums vary in digits."""
        return next(width for width in widths if put(folder, width, time_ns) == size)

    def read(folder: str) -> tuple[int, int]:
        """Width of the one image, and bytes that were read for it."""
        store = FarStore(str(tmp_path / folder))
        width = int(load_index(store, cache=cache).column("width", 0, 1)[0])
        return width, store.counters["bytes"]

    size = put("one", 16, 10**18)
    other = put_same_size("two", range(17, 200), 10**18)
    for folder, width in (("one", 16), ("two", other)):
        assert read(folder)[0] == width and read(folder) == (width, 0)
    replaced = put_same_size("one", range(200, 400), 10**18 + 10**9)
    assert read("one")[0] == replaced and read("one") == (replaced, 0) and read("two") == (other, 0)
