"""The index: building it, what it rejects, damage, and filters."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import Filters
from data_pipeline.errors import DataError
from data_pipeline.index.build import ScanSettings, build_index, save_index
from data_pipeline.index.filter import select
from data_pipeline.index.format import SCORE, load_index
from data_pipeline.storage.base import open_store
from tests.support.sets import png, tar_of, write_set


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
    place = whole.rindex(b"2.txt")
    (tmp_path / "e.tar").write_bytes(whole[:place] + b"?" + whole[place + 1 :])
    index, _ = build_index(open_store(str(tmp_path)))
    text = "\n".join(index.problems)
    for part in (
        "a.tar: 1: no_caption", "a.tar: 3: no_image", "a.tar: 4: undecodable",
        "a.tar: 5: bad_caption", "a.tar: 6: bad_caption",
        "a.tar: x/2: duplicate: this key came before", "b.tar: no end-of-archive mark", "c.tar: ", "d.tar: ",
        f"e.tar: damaged tar header at byte {place} after ",
    ):  # fmt: skip
        assert part in text, part
    assert (
        index.ends.tolist()[0] == 1 and (tmp_path / "a.tar").read_bytes()[index.locate(0).start :][:5] == b"x/2.p"
    )
    assert index.ends[3] - index.ends[1] == 0


def test_a_folder_at_the_end_of_a_shard_is_no_damage(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.png", png()), ("1.txt", b"one"), ("folder", None)):
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            tar.addfile(info, io.BytesIO(data or b""))
    index, _ = build_index(open_store(str(tmp_path)))
    assert len(index) == 1 and not index.problems


@pytest.mark.parametrize("workers", [1, 2])
def test_an_index_is_made_again_only_for_what_changed(tmp_path: Path, workers: int) -> None:
    for name in "abc":
        members = {k: v for i in range(5) for k, v in ((f"{i}.png", png(salt=i)), (f"{i}.txt", name.encode()))}
        (tmp_path / f"{name}.tar").write_bytes(tar_of(members))
    store = open_store(str(tmp_path))
    index, reused = build_index(store, workers=workers)
    assert reused == 0 and len(index) == 15
    save_index(store, index)
    (tmp_path / "d.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "b.tar").write_bytes(tar_of({"9.png": png(), "9.txt": b"new"}))
    index, reused = build_index(store, workers=workers)
    assert reused == 2 and len(index) == 16
    fresh, reused = build_index(store, workers=workers, fresh=True)
    assert reused == 0 and fresh.digest == index.digest
    assert build_index(store, ScanSettings(scores=("aesthetic",)))[1] == 0


def test_index_round_trips_bit_by_bit_and_damage_is_detected(tmp_path: Path) -> None:
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
