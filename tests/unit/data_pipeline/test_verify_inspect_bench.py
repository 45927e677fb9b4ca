"""``deco-data``: inspecting, verifying, measuring; exit codes."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.index.format import COLUMNS, load_index, make_index
from data_pipeline.pack.verify import verify
from data_pipeline.pack.writer import MANIFEST_KEY
from data_pipeline.storage.base import ObjectInfo, open_store
from data_pipeline.tools import cli, inspect
from tests.support.sets import IMAGE, files_form, tar_of


@pytest.fixture
def packed(tmp_path: Path) -> Iterator[Path]:
    """Indexed shards of 12 samples."""
    source, out = files_form(tmp_path / "source", 12), tmp_path / "out"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["pack", str(source), str(out), "--shard-mb", "0.012"]) == 0
    yield out


def problems_of(folder: Path) -> list[str]:
    return verify(open_store(str(folder)), decode_images=True).problems


def keep_time(path: Path, data: bytes) -> None:
    """Change a file so that its tag stays: as a disk or a network damages it."""
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_verify_passes_when_all_is_well(packed: Path) -> None:
    report = verify(open_store(str(packed)), workers=2, decode_images=True)
    assert not report.problems and report.samples == report.decoded == 12
    assert report.shards == report.checksums > 2
    assert report.bytes == sum(path.stat().st_size for path in packed.glob("*.tar"))


@pytest.mark.parametrize("place", ["image", "header", "padding"])
def test_verify_finds_one_flipped_bit(place: str, packed: Path) -> None:
    path = packed / "shard-00001.tar"
    index = load_index(open_store(str(packed)))
    sample = next(i for i in range(len(index)) if index.locate(i).shard == 1) + 1
    location = index.locate(sample)
    at = {
        "image": location.start + location.image.stop - 9,
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
        "shard-00000.tar: " + f"{len(raw) - 1024} bytes, the index has {len(raw)}",
        "shard-00001.tar: in the index, but missing",
        f"shard-00001.tar: in {MANIFEST_KEY}, but missing",
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
        monkeypatch.setattr("data_pipeline.pack.verify.PIECE_BYTES", size)
        report = verify(open_store(str(packed)), decode_images=True)
        assert not report.problems and report.decoded == 12


@pytest.mark.slow
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
    summary = inspect.summarise(make_index([ObjectInfo("a.tar", 1, "")], [len(sides)], columns))
    short = np.array(sides).min(axis=1)
    for share in (0, 0.05, 0.5, 1):
        assert inspect.quantile(summary.sides, share) == np.quantile(short, share, method="inverted_cdf")
    assert summary.aspects.sum() == summary.sizes.sum() == summary.kinds["txt"] == len(sides)


def test_captions_are_wrapped_into_their_tile() -> None:
    for texts in (["x" * 500], ["a b " * 300], ["short"], ["one", "two"], [str(i) for i in range(9)]):
        rows = inspect._wrap(texts, 35, 5)
        assert 1 <= len(rows) <= 5 and all(len(row) <= 35 for row in rows)
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
        (["verify", "{}"], 1, "no shards and no index"),
        (["bench", "{}"], 1, "no shards and no index"),
        (["pack", "{}/nowhere", "{}/out"], 1, "no such folder or file"),
        (["pack", "{}", "{}/out"], 1, "has no images"),
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
    (tmp_path / "a.tar").write_bytes(tar_of({f"{i}.png": IMAGE for i in range(30)}))
    assert cli.main(["index", str(tmp_path), "--problems", str(tmp_path / "problems.txt")]) == 1
    captured = capsys.readouterr()
    assert "30 not usable" in captured.out and "and 10 more" in captured.out and "a.tar: 7: " in captured.out
    assert len((tmp_path / "problems.txt").read_text().splitlines()) == 30
    assert "none of the samples is usable" in captured.err


@pytest.mark.slow
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
