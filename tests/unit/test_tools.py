"""``deco-data``: packing from every kind of source, indexing, inspecting, verifying, measuring."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import cli, show
from data_pipeline.captions import parse_captions
from data_pipeline.errors import DataError, StoreError
from data_pipeline.index import COLUMNS, load_index, make_index
from data_pipeline.pack import MANIFEST_KEY, MARK_KEY, OccupiedError, pack
from data_pipeline.sources import RawSample, make_sample, read_source
from data_pipeline.store import LocalStore, ObjectInfo, open_store
from data_pipeline.verify import verify

LONG = "a very long caption " * 5000


def picture(seed: int, suffix: str = "png", size: tuple[int, int] = (40, 48)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """What the webdataset package reads, keys and origins left out."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    return [{k: v for k, v in sample.items() if not k.startswith("__")} for sample in read]


def read_all(source: Path) -> tuple[list[RawSample], list[str]]:
    skipped: list[str] = []
    return list(read_source(str(source), skipped)), skipped


def files_form(folder: Path, count: int = 4) -> Path:
    """As img2dataset's ``files`` writes: pictures with .txt and .json, parquet and stats beside the folders."""
    (folder / "00000").mkdir(parents=True)
    for i in range(count):
        path = folder / "00000" / f"{i:09d}.jpg"
        path.write_bytes(picture(i, "jpg"))
        path.with_suffix(".txt").write_text(f"caption {i}", encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(img2dataset_entry(i)))
    (folder / "00000" / f"{count:09d}.json").write_text('{"status": "failed_to_download"}')
    (folder / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"key": ["000000000"], "caption": ["caption 0"]}), folder / "00000.parquet")
    return folder


def webdataset_form(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "00000.tar")) as writer:
        for i in range(count):
            writer.write(
                {
                    "__key__": f"{i:09d}",
                    "jpg": picture(i, "jpg"),
                    "txt": f"caption {i}",
                    "json": img2dataset_entry(i),
                }
            )
    (folder / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"key": ["000000000"], "caption": ["caption 0"]}), folder / "00000.parquet")
    return folder


def parquet_form(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    rows = [img2dataset_entry(i) | {"jpg": picture(i, "jpg")} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    return folder


def img2dataset_entry(i: int) -> dict[str, Any]:
    return {
        "key": f"{i:09d}",
        "caption": f"caption {i}",
        "url": "http://nowhere.invalid/x.jpg",
        "status": "success",
        "error_message": None,
        "width": 48,
        "aesthetic": 5.0 + i,
    }


@pytest.mark.parametrize("form", [files_form, webdataset_form, parquet_form])
def test_all_forms_of_img2dataset_become_the_same_samples(form: Any, tmp_path: Path) -> None:
    found, skipped = read_all(form(tmp_path / "source"))
    assert not skipped
    assert [sample.image for sample in found] == [picture(i, "jpg") for i in range(4)]
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
        assert raw[place.image] == sample["jpg"] == picture(i, "jpg")
        assert raw[place.text] == sample["json"]
        assert parse_captions(raw[place.text], is_json=place.is_json).texts == (f"caption {i}",)
    manifest = json.loads((out / MANIFEST_KEY).read_bytes())
    assert [entry["key"] for entry in manifest] == [shard.key for shard in index.shards]
    assert sum(entry["samples"] for entry in manifest) == 7
    for entry in manifest:
        raw = (out / entry["key"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_packing_twice_and_repacking_what_was_packed_give_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, suffix in enumerate(("png", "jpg", "webp", "gif", "png")):
        (folder / f"{i}.{suffix}").write_bytes(picture(i, suffix))
        (folder / f"{i}.txt").write_text(f"eine Katze für {i}: 猫 🐈", encoding="utf-8")
    (folder / "4.json").write_text(
        json.dumps({"captions": [{"text": "a", "weight": 3}, {"text": "b", "weight": 1}], "clip": 0.25})
    )

    def packed(source: Path, name: str) -> dict[str, bytes]:
        out = tmp_path / name
        skipped: list[str] = []
        pack(read_source(str(source), skipped, workers=3), open_store(str(out)), shard_bytes=9000, skipped=skipped)
        assert not skipped
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
    sample = make_sample("x", PICTURE, entries=entries, text=None, label=None)
    members = sample.texts()
    ((suffix, raw),) = members.items()
    assert list(parse_captions(raw, is_json=suffix == "json").texts) == texts
    if suffix == "json":
        again = make_sample("x", PICTURE, entries=json.loads(raw), text=None, label=None)
        assert again == sample


PICTURE = picture(0)


def test_long_and_short_captions_of_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [{"bytes": picture(0), "path": None}, {"bytes": None, "path": "../../etc/passwd"}, None],
            "long_caption": ["long", "x", "y"],
            "short_caption": ["short", "x", "y"],
            "image_url": ["http://nowhere.invalid/1", "", ""],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    (sample,), skipped = read_all(tmp_path / "x.parquet")
    assert sample.captions == ["long", "short"] and sample.fields == {"image_url": "http://nowhere.invalid/1"}
    assert "row 1" in skipped[0] and "outside of" in skipped[0] and "row 2" in skipped[1]
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="download them first"):
        read_all(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="needs one of the columns"):
        read_all(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not a parquet file PAR1")
    assert len(read_all(tmp_path / "x.parquet")[1]) == 1


def test_pictures_of_a_parquet_file_by_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "caption": ["one", "two"]}), tmp_path / "x.parquet")
    (sample,), skipped = read_all(tmp_path / "x.parquet")
    assert sample.image == picture(1) and "b.png" in skipped[0]


def test_what_cannot_be_packed_is_listed_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in {
        "good.png": PICTURE, "good.txt": b"fine",
        "lonely.png": PICTURE,
        "torn.png": b"\x89PNG not really", "torn.txt": b"x",
        "blank.png": PICTURE, "blank.txt": b" \n",
        "latin.png": PICTURE, "latin.txt": b"\xff\xfe",
        "listed.png": PICTURE, "listed.json": b"[1]",
        "long.png": PICTURE, "long.txt": b"x" * (2**20 + 1),
        "other.bmp": b"BM", "other.txt": b"x",
        "label.png": PICTURE, "label.cls": b"7",
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    found, skipped = read_all(folder)
    assert [(Path(s.name).name, s.captions, s.label) for s in found] == [
        ("good.png", ["fine"], None),
        ("label.png", [], 7),
    ]
    names = ["blank", "latin", "listed", "lonely", "long", "other", "torn"]
    assert [Path(line.split(":")[0]).stem for line in skipped] == names


def test_a_caption_longer_than_a_column_holds_is_kept_whole(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(PICTURE)
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
        pack(read_source(str(source), []), store, shard_bytes=12_000, skipped=[], **more)

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
    pack(read_source(str(source), []), LocalStore(str(out)), shard_bytes=10**9, skipped=[], overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["shard-00000.tar", MANIFEST_KEY]
    assert len(packed) > 4 and len(samples_of(out)) == 20


def test_shards_of_others_are_never_replaced(tmp_path: Path) -> None:
    source, out = files_form(tmp_path / "source"), tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "theirs.tar").write_bytes(tar_of({"a.png": PICTURE, "a.txt": b"x"}))
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
    report = pack(read_source(str(source), []), store, shard_bytes=8000, skipped=[])
    assert len(report.shards) > 5 and 1 <= most <= 2


def test_nothing_to_pack_changes_nothing(tmp_path: Path) -> None:
    source, out = files_form(tmp_path / "source"), tmp_path / "out"
    assert cli.main(["pack", str(source), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "poor").mkdir()
    (tmp_path / "poor" / "a.png").write_bytes(PICTURE)
    assert cli.main(["pack", str(tmp_path / "poor"), str(out), "--overwrite"]) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_shards_of_webdatasets_writers_are_indexed_as_they_are(tmp_path: Path) -> None:
    pattern = str(tmp_path / "raw-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for i in range(8):
            writer.write({"__key__": f"dir/s{i}", "png": picture(i), "json": {"caption": f"{i}", "score": i}})
    with webdataset.ShardWriter(str(tmp_path / "label-%04d.tar"), verbose=0) as writer:
        writer.write({"__key__": "c", "jpg": picture(9, "jpg"), "cls": 3})
    assert cli.main(["index", str(tmp_path), "--score", "score"]) == 0
    index = load_index(open_store(str(tmp_path)))
    assert len(index) == 9 and index.locate(0).is_label
    assert index.columns["score.score"].tolist()[1:] == [float(i) for i in range(8)]
    assert cli.main(["verify", str(tmp_path), "--decode", "--workers", "2"]) == 0


def test_class_numbers_are_packed_and_found_beside_numbers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    members = {
        f"{i}.{k}": v for i in range(3) for k, v in (("png", PICTURE), ("cls", b"5"), ("json", b'{"q": 2}'))
    }
    (source / "a.tar").write_bytes(tar_of(members))
    assert cli.main(["pack", str(source), str(tmp_path / "out"), "--score", "q"]) == 0
    index = load_index(open_store(str(tmp_path / "out")))
    assert index.columns["score.q"].tolist() == [2, 2, 2] and index.locate(1).is_label
    assert samples_of(tmp_path / "out")[0] == {"png": PICTURE, "cls": b"5", "json": b'{"q": 2}'}


def test_a_full_disk_is_told_in_one_line(
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
            for suffix, data in (("png", PICTURE), ("txt", b"x")):
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
    found, skipped = read_all(source)
    assert len(found) == 3 and len(skipped) == 1 and "link: no image" in skipped[0]
    assert cli.main(["index", str(source), "--problems", str(tmp_path / "problems")]) == 0
    assert cli.main(["verify", str(source), "--decode"]) == 0
    (tmp_path / "problems").unlink()
    (source / "index.safetensors").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert "\x1b" not in capsys.readouterr().out


@pytest.fixture
def packed(tmp_path: Path) -> Iterator[Path]:
    """Indexed shards of 12 samples."""
    source, out = files_form(tmp_path / "source", 12), tmp_path / "out"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["pack", str(source), str(out), "--shard-mb", "0.012"]) == 0
    yield out


def problems_of(folder: Path) -> list[str]:
    return verify(open_store(str(folder)), decode_pictures=True).problems


def keep_time(path: Path, data: bytes) -> None:
    """Change a file so that its tag stays: as a disk or a network damages it."""
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_verify_passes_when_all_is_well(packed: Path) -> None:
    report = verify(open_store(str(packed)), workers=2, decode_pictures=True)
    assert not report.problems and report.samples == report.decoded == 12
    assert report.shards == report.checksums > 2
    assert report.bytes == sum(path.stat().st_size for path in packed.glob("*.tar"))


@pytest.mark.parametrize("place", ["picture", "header", "padding"])
def test_verify_finds_one_flipped_bit(place: str, packed: Path) -> None:
    path = packed / "shard-00001.tar"
    index = load_index(open_store(str(packed)))
    sample = next(i for i in range(len(index)) if index.locate(i).shard == 1) + 1
    location = index.locate(sample)
    at = {
        "picture": location.start + location.image.stop - 9,
        "header": location.start + 3,
        "padding": location.start + location.text.stop,
    }[place]
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    keep_time(path, bytes(raw))
    found = problems_of(packed)
    assert all(problem.startswith("shard-00001.tar: ") for problem in found)
    assert any("CRC32C" in problem and (place == "header" or f"{sample:09d}" in problem) for problem in found)
    assert any("SHA-256" in problem for problem in found)
    assert any("damaged tar header" in problem for problem in found) == (place == "header")
    assert cli.main(["verify", str(packed)]) == 1


def test_verify_finds_replaced_missing_unknown_and_cut_shards(packed: Path) -> None:
    first, second, third = (packed / f"shard-0000{i}.tar" for i in range(3))
    raw = first.read_bytes()
    first.write_bytes(raw)
    assert any("was replaced: ETag" in problem for problem in problems_of(packed))
    first.write_bytes(raw[:-1024])
    second.unlink()
    (packed / "new.tar").write_bytes(third.read_bytes())
    found = "\n".join(problems_of(packed))
    for part in (
        "shard-00000.tar: " + f"{len(raw) - 1024} bytes, the index says {len(raw)}",
        "shard-00001.tar: in the index, not there",
        f"shard-00001.tar: in {MANIFEST_KEY}, not there",
        "new.tar: is not in the index",
    ):
        assert part in found
    assert "shard-00002.tar" not in found


def test_verify_finds_a_wrong_sha256_and_a_shard_without_end(packed: Path) -> None:
    manifest = json.loads((packed / MANIFEST_KEY).read_bytes())
    manifest[1]["sha256"] = "0" * 64
    (packed / MANIFEST_KEY).write_text(json.dumps(manifest))
    assert problems_of(packed) == [f"shard-00001.tar: SHA-256 or size differs from {MANIFEST_KEY}"]
    (packed / MANIFEST_KEY).write_text("[{]")
    assert len(problems_of(packed)) == 1
    (packed / MANIFEST_KEY).unlink()
    assert not problems_of(packed)
    path = packed / "shard-00000.tar"
    index = load_index(open_store(str(packed)))
    last = max(index.locate(i).end for i in range(len(index)) if index.locate(i).shard == 0)
    path.write_bytes(path.read_bytes()[:last])
    assert cli.main(["index", str(packed)]) == 0
    assert any("end-of-archive" in problem for problem in problems_of(packed))


def test_verify_reads_in_pieces_of_any_size(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (512, 1536, 4096):
        monkeypatch.setattr("data_pipeline.verify.PIECE_BYTES", size)
        report = verify(open_store(str(packed)), decode_pictures=True)
        assert not report.problems and report.decoded == 12


def test_inspect_draws_both_figures(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["index", str(packed), "--score", "aesthetic", "width", "absent"]) == 0
    figures = tmp_path / "figures"
    capsys.readouterr()
    arguments = ["--figures", str(figures), "--samples", "8", "--resolution", "32", "64"]
    assert cli.main(["inspect", str(packed), *arguments]) == 0
    out = capsys.readouterr().out
    for part in (
        "usable at 32 px",
        "12 (100.0%)",
        "0 (0.0%)",
        "0, 12, 0",
        "5 to 16 in 12 samples",
        "in no sample",
    ):
        assert part in out
    for name, least in (("histograms.png", (1000, 800)), ("contact_sheet.png", (1500, 600))):
        with Image.open(figures / name) as opened:
            assert opened.width >= least[0] and opened.height >= least[1]
            assert len(opened.convert("RGB").getcolors(2**24) or ()) > 50
    first = (figures / "contact_sheet.png").read_bytes()
    assert cli.main(["inspect", str(packed), *arguments]) == 0
    assert (figures / "contact_sheet.png").read_bytes() == first


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 65_535), st.integers(1, 65_535)), min_size=1, max_size=50))
def test_summary_is_numpys(sides: list[tuple[int, int]]) -> None:
    columns: dict[str, Any] = {name: np.zeros(len(sides), dtype) for name, dtype in COLUMNS.items()}
    columns["height"], columns["width"] = np.array(sides).T
    columns["length"][:] = 3
    summary = show.summarise(make_index([ObjectInfo("a.tar", 1, "")], [len(sides)], columns))
    short = np.array(sides).min(axis=1)
    for share in (0, 0.05, 0.5, 1):
        assert show.quantile(summary.sides, share) == np.quantile(short, share, method="inverted_cdf")
    assert summary.aspects.sum() == summary.sizes.sum() == summary.kinds["txt"] == len(sides)


def test_captions_are_wrapped_into_their_tile() -> None:
    font = show._font(15)
    for texts in (["x" * 500], ["a b " * 300], ["short"], ["one", "two"], [str(i) for i in range(9)]):
        rows = show._wrap(texts, font, 256, 5)
        assert 1 <= len(rows) <= 5 and all(font.getlength(row) <= 256 for row in rows)
        assert rows[-1].endswith("...") == (len(" ".join(texts)) > 20 or len(texts) > 5)


def test_bench_measures_both_modes(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(packed), "--seconds", "0.1", "--resolution", "32", "--workers", "1"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for part in ("exact, 1 workers", "fast, 1 workers", "images/s", "MB/s read", "decoded", "chunks"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["inspect", "{}/nowhere"], 1, "no such folder"),
        (["inspect", "gs://bucket/x"], 1, "only s3:// URLs"),
        (["index", "pipe:cat /etc/passwd"], 1, "no such folder"),
        (["index", "{}"], 1, "no .tar shards"),
        (["verify", "{}"], 1, "nothing is here"),
        (["bench", "{}"], 1, "nothing is here"),
        (["pack", "{}/nowhere", "{}/out"], 1, "no such folder or file"),
        (["pack", "{}", "{}/out"], 1, "holds no pictures"),
        (["pack", "{}", "{}/out", "--shard-mb", "0"], 2, "not above 0"),
        (["index", "{}", "--text", "png"], 2, "txt, json, cls"),
        (["verify", "{}", "--workers", "0"], 2, "not at least 1"),
        (["mend", "{}"], 2, "mend"),
        ([], 2, "command"),
    ],
)
def test_exit_codes_and_one_line_of_error(
    arguments: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = cli.main([argument.format(tmp_path) for argument in arguments])
    except SystemExit as exit:
        found = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert found == code
    assert error.startswith("deco-data: ") and error.count("\n") == 1 and said in error


def test_an_index_without_usable_samples_fails_and_names_all_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({f"{i}.png": PICTURE for i in range(30)}))
    assert cli.main(["index", str(tmp_path), "--problems", str(tmp_path / "problems.txt")]) == 1
    captured = capsys.readouterr()
    assert "30 not usable" in captured.out and "and 10 more" in captured.out and "a.tar: 7: " in captured.out
    assert len((tmp_path / "problems.txt").read_text().splitlines()) == 30
    assert "none of the samples is usable" in captured.err


def test_the_same_over_s3(s3_environment: Any, tmp_path: Path) -> None:
    s3_environment.create_bucket("tools")
    source = files_form(tmp_path / "source", 9)
    assert cli.main(["pack", str(source), "s3://tools/first", "--shard-mb", "0.012"]) == 0
    assert cli.main(["pack", str(source), "s3://tools/first"]) == 2
    assert cli.main(["pack", "s3://tools/first", "s3://tools/second", "--shard-mb", "0.012"]) == 0
    assert cli.main(["verify", "s3://tools/second", "--decode"]) == 0
    first, second = (open_store(f"s3://tools/{name}") for name in ("first", "second"))
    assert first.read_all(MANIFEST_KEY) == second.read_all(MANIFEST_KEY)
    shard = second.read_all("shard-00001.tar")
    assert shard is not None
    second.write("shard-00001.tar", shard[:700] + b"!" + shard[701:])
    assert cli.main(["verify", "s3://tools/second"]) == 1
