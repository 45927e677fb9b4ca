"""``deco-data pack``: every kind of source becomes the same shards, whole or not at all."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.captions import parse_captions
from data_pipeline.errors import DataError, Reject, StoreError
from data_pipeline.index.format import load_index
from data_pipeline.pack.readers import make_sample, read_source
from data_pipeline.pack.writer import MANIFEST_KEY, MARK_KEY, OccupiedError, pack
from data_pipeline.storage.base import LocalStore, open_store
from data_pipeline.tools import cli
from tests.support.sets import (
    IMAGE,
    LONG,
    files_form,
    image_bytes,
    img2dataset_entry,
    parquet_form,
    read_all,
    samples_of,
    tar_of,
    webdataset_form,
)


@pytest.mark.parametrize("form", [files_form, webdataset_form, parquet_form])
def test_all_forms_of_img2dataset_become_the_same_samples(form: Any, tmp_path: Path) -> None:
    found, rejects = read_all(form(tmp_path / "source"))
    assert not rejects
    assert [sample.image for sample in found] == [image_bytes(i, "jpg") for i in range(4)]
    assert [sample.captions for sample in found] == [[f"caption {i}"] for i in range(4)]
    wanted = {k: v for k, v in img2dataset_entry(2).items() if k not in ("caption", "error_message")}
    assert found[2].fields == wanted


@pytest.mark.parametrize("form", [files_form, webdataset_form, parquet_form])
def test_what_is_packed_is_what_webdataset_reads_and_the_index_finds(form: Any, tmp_path: Path) -> None:
    source, out = form(tmp_path / "source", 7), tmp_path / "out"
    arguments = ["--shard-mb", "0.01", "--score", "aesthetic", "absent", "--workers", "1"]
    assert cli.main(["pack", str(source), str(out), *arguments]) == 0
    index = load_index(open_store(str(out)))
    theirs = samples_of(out)
    assert len(index) == len(theirs) == 7 and len(index.shards) > 1
    assert index.columns["score.aesthetic"].tolist() == [5.0 + i for i in range(7)]
    assert np.isnan(index.columns["score.absent"]).all()
    for i, sample in enumerate(theirs):
        place = index.locate(i)
        raw = (out / index.shards[place.shard].key).read_bytes()[place.start : place.end]
        assert raw[place.image] == sample["jpg"] == image_bytes(i, "jpg")
        assert raw[place.text] == sample["json"]
        assert parse_captions(raw[place.text], is_json=place.is_json).texts == (f"caption {i}",)
    manifest = json.loads((out / MANIFEST_KEY).read_bytes())
    assert [entry["key"] for entry in manifest] == [shard.key for shard in index.shards]
    assert sum(entry["samples"] for entry in manifest) == 7
    for entry in manifest:
        raw = (out / entry["key"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_packing_twice_and_repacking_what_was_packed_give_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, suffix in enumerate(("png", "jpg", "webp", "gif", "png")):
        (folder / f"{i}.{suffix}").write_bytes(image_bytes(i, suffix))
        (folder / f"{i}.txt").write_text(f"eine Katze für {i}: 猫 🐈", encoding="utf-8")
    (folder / "4.json").write_text(
        json.dumps({"captions": [{"text": "a", "weight": 3}, {"text": "b", "weight": 1}], "clip": 0.25})
    )

    def packed(source: Path, name: str) -> dict[str, bytes]:
        out = tmp_path / name
        rejects: list[Reject] = []
        pack(read_source(str(source), rejects, workers=3), open_store(str(out)), shard_bytes=9000, rejects=rejects)
        assert not rejects
        return {path.name: path.read_bytes() for path in out.iterdir()}

    first = packed(folder, "first")
    assert len(first) > 2
    assert packed(folder, "second") == first
    assert packed(tmp_path / "first", "third") == first
    theirs = samples_of(tmp_path / "first")
    assert theirs[0]["txt"].decode() == "eine Katze für 0: 猫 🐈"
    assert [next(iter(sample)) for sample in theirs] == ["png", "jpg", "webp", "gif", "png"]
    assert parse_captions(theirs[4]["json"], is_json=True).weights == (3.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1), min_size=1, max_size=4),
    fields=st.dictionaries(
        st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.floats() | st.text(), max_size=4
    ),
)
def test_captions_and_scalars_survive(texts: list[str], fields: dict[str, Any]) -> None:
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip())) or ["x"]
    entries = fields | {"captions": texts}
    sample = make_sample("x", IMAGE, entries=entries, text=None, label=None)
    members = sample.texts()
    ((suffix, raw),) = members.items()
    assert list(parse_captions(raw, is_json=suffix == "json").texts) == texts
    if suffix == "json":
        again = make_sample("x", IMAGE, entries=json.loads(raw), text=None, label=None)
        assert again == sample


def test_long_and_short_captions_of_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [
                {"bytes": image_bytes(0), "path": None},
                {"bytes": None, "path": "../../etc/passwd"},
                None,
            ],
            "long_caption": ["long", "x", "y"],
            "short_caption": ["short", "x", "y"],
            "image_url": ["http://nowhere.invalid/1", "", ""],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    (sample,), rejects = read_all(tmp_path / "x.parquet")
    assert sample.captions == ["long", "short"] and sample.fields == {"image_url": "http://nowhere.invalid/1"}
    assert "row 1" in rejects[0].name and "outside of" in rejects[0].reason and "row 2" in rejects[1].name
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="download them first"):
        read_all(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="needs one of the columns"):
        read_all(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not a parquet file PAR1")
    assert len(read_all(tmp_path / "x.parquet")[1]) == 1


def test_images_of_a_parquet_file_by_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "caption": ["one", "two"]}), tmp_path / "x.parquet")
    (sample,), rejects = read_all(tmp_path / "x.parquet")
    assert sample.image == image_bytes(1) and "b.png" in rejects[0].reason


def test_what_cannot_be_packed_is_listed_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, data in {
        "good.png": IMAGE, "good.txt": b"fine",
        "lonely.png": IMAGE,
        "torn.png": b"\x89PNG not really", "torn.txt": b"x",
        "blank.png": IMAGE, "blank.txt": b" \n",
        "latin.png": IMAGE, "latin.txt": b"\xff\xfe",
        "listed.png": IMAGE, "listed.json": b"[1]",
        "long.png": IMAGE, "long.txt": b"x" * (2**20 + 1),
        "other.bmp": b"BM", "other.txt": b"x",
        "label.png": IMAGE, "label.cls": b"7",
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    found, rejects = read_all(folder)
    assert [(Path(s.name).name, s.captions, s.label) for s in found] == [
        ("good.png", ["fine"], None),
        ("label.png", [], 7),
    ]
    names = ["blank", "latin", "listed", "lonely", "long", "other", "torn"]
    assert [Path(reject.name).stem for reject in rejects] == names


def test_a_caption_longer_than_a_column_holds_is_kept_whole(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(IMAGE)
    (folder / "a.txt").write_text(LONG)
    assert cli.main(["pack", str(folder), str(tmp_path / "out")]) == 0
    assert samples_of(tmp_path / "out")[0]["txt"].decode() == LONG.strip()
    arguments = ["inspect", str(tmp_path / "out"), "--figures", str(tmp_path / "figures"), "--resolution", "32"]
    assert cli.main(arguments) == 0


class Breaks(LocalStore):
    """A store that fails, or whose process dies, at one shard."""

    def __init__(self, root: str, error: BaseException) -> None:
        super().__init__(root)
        self.error = error

    def write_file(self, key: str, path: Path) -> None:
        if key == "shard-00002.tar":
            raise self.error
        super().write_file(key, path)


@pytest.mark.parametrize("error", [StoreError("full"), KeyboardInterrupt()])
def test_interrupted_packing_leaves_whole_shards_and_a_rerun_replaces_them(
    error: BaseException, tmp_path: Path
) -> None:
    source, out = files_form(tmp_path / "source", 20), tmp_path / "out"

    def run(store: LocalStore, **more: Any) -> None:
        pack(read_source(str(source), []), store, shard_bytes=12_000, rejects=[], **more)

    with pytest.raises(type(error)):
        run(Breaks(str(out), error))
    left = sorted(path.name for path in out.iterdir())
    assert left == ["shard-00000.tar", "shard-00001.tar", MARK_KEY]
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert tar.getmembers()
    run(LocalStore(str(out)))
    assert not (out / MARK_KEY).exists() and len(samples_of(out)) == 20
    packed = {path.name: path.read_bytes() for path in out.iterdir()}
    # Finished: nothing is replaced unless that is asked for, and then no older shard stays.
    with pytest.raises(OccupiedError, match="--overwrite"):
        run(LocalStore(str(out)))
    pack(read_source(str(source), []), LocalStore(str(out)), shard_bytes=10**9, rejects=[], overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["shard-00000.tar", MANIFEST_KEY]
    assert len(packed) > 4 and len(samples_of(out)) == 20


def test_shards_of_others_are_never_replaced(tmp_path: Path) -> None:
    source, out = files_form(tmp_path / "source"), tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "theirs.tar").write_bytes(tar_of({"a.png": IMAGE, "a.txt": b"x"}))
    before = (out / "deep" / "theirs.tar").read_bytes()
    assert cli.main(["pack", str(source), str(out)]) == 2
    assert cli.main(["pack", str(source), str(out), "--overwrite"]) == 2
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["theirs.tar"]
    assert (out / "deep" / "theirs.tar").read_bytes() == before


def test_at_most_two_shards_are_on_the_disk(tmp_path: Path) -> None:
    most = 0

    class Watches(LocalStore):
        def write_file(self, key: str, path: Path) -> None:
            nonlocal most
            most = max(most, len(list(path.parent.iterdir())))
            super().write_file(key, path)

    source = files_form(tmp_path / "source", 30)
    store = Watches(str(tmp_path / "out"))
    report = pack(read_source(str(source), []), store, shard_bytes=8000, rejects=[])
    assert len(report.shards) > 5 and 1 <= most <= 2


def test_nothing_to_pack_changes_nothing(tmp_path: Path) -> None:
    source, out = files_form(tmp_path / "source"), tmp_path / "out"
    assert cli.main(["pack", str(source), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "poor").mkdir()
    (tmp_path / "poor" / "a.png").write_bytes(IMAGE)
    assert cli.main(["pack", str(tmp_path / "poor"), str(out), "--overwrite"]) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_shards_of_webdatasets_writers_are_indexed_as_they_are(tmp_path: Path) -> None:
    pattern = str(tmp_path / "raw-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for i in range(8):
            writer.write({"__key__": f"dir/s{i}", "png": image_bytes(i), "json": {"caption": f"{i}", "score": i}})
    with webdataset.ShardWriter(str(tmp_path / "label-%04d.tar"), verbose=0) as writer:
        writer.write({"__key__": "c", "jpg": image_bytes(9, "jpg"), "cls": 3})
    assert cli.main(["index", str(tmp_path), "--score", "score"]) == 0
    index = load_index(open_store(str(tmp_path)))
    assert len(index) == 9 and index.locate(0).is_label
    assert index.columns["score.score"].tolist()[1:] == [float(i) for i in range(8)]
    assert cli.main(["verify", str(tmp_path), "--decode", "--workers", "2"]) == 0


def test_class_numbers_are_packed_and_read_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    members = {f"{i}.{k}": v for i in range(3) for k, v in (("png", IMAGE), ("cls", b"5"), ("json", b'{"q": 2}'))}
    (source / "a.tar").write_bytes(tar_of(members))
    assert cli.main(["pack", str(source), str(tmp_path / "out"), "--score", "q"]) == 0
    index = load_index(open_store(str(tmp_path / "out")))
    assert index.columns["score.q"].tolist() == [2, 2, 2] and index.locate(1).is_label
    assert samples_of(tmp_path / "out")[0] == {"png": IMAGE, "cls": b"5", "json": b'{"q": 2}'}


def test_a_full_disk_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = files_form(tmp_path / "source")

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device", "/scratch")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    assert cli.main(["pack", str(source), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "deco-data: /scratch: No space left on device\n"


def hostile_tar(outside: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("../../escaped", str(outside / "absolute"), "plain/\x1b[31mred"):
            for suffix, data in (("png", IMAGE), ("txt", b"x")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("link.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    return buffer.getvalue()


def test_names_and_links_in_tars_reach_no_disk_and_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, outside = tmp_path / "a" / "b" / "source", tmp_path / "outside"
    source.mkdir(parents=True)
    outside.mkdir()
    (source / "x.tar").write_bytes(hostile_tar(outside))
    for name in ("extract", "extractall", "extractfile"):
        monkeypatch.delattr(tarfile.TarFile, name)
    before = sorted(tmp_path.rglob("*"))
    found, rejects = read_all(source)
    assert len(found) == 3 and len(rejects) == 1 and "link: no image" in str(rejects[0])
    assert cli.main(["index", str(source), "--problems", str(tmp_path / "problems")]) == 0
    assert cli.main(["verify", str(source), "--decode"]) == 0
    (tmp_path / "problems").unlink()
    (source / "index.safetensors").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert "\x1b" not in capsys.readouterr().out
