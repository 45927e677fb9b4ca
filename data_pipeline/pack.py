"""Pack pictures and captions into WebDataset tar shards.

Sources: a folder with a ``.txt`` or ``.json`` file beside each picture, or a parquet file with a picture
column (bytes, or a path) and a caption column (text, or a list of texts). Pictures are stored as they are.
"""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.captions import parse_captions
from data_pipeline.decode import DecodeError
from data_pipeline.errors import DataError
from data_pipeline.index import IMAGE_SUFFIXES
from data_pipeline.store import Store

IMAGE_COLUMNS = ("image", "jpg", "png", "image_bytes", "image_path", "path")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, slots=True)
class RawSample:
    """Encoded picture, its suffix, and its captions; ``name`` is for error messages."""

    name: str
    image: bytes
    suffix: str
    captions: list[str]


@dataclass
class PackReport:
    """What was written and what was left out, by name."""

    samples: int
    shards: list[str]
    skipped: list[str]


def read_folder(folder: Path, skipped: list[str]) -> Iterator[RawSample]:
    """Pictures below ``folder`` in the order of their names; those without captions go to ``skipped``."""
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    for path in pictures:
        beside = next((p for p in map(path.with_suffix, (".txt", ".json")) if p.exists()), None)
        if beside is None:
            skipped.append(f"{path}: no .txt or .json beside it")
            continue
        try:
            captions = parse_captions(beside.read_bytes(), is_json=beside.suffix == ".json")
        except DecodeError as error:
            skipped.append(f"{beside}: {error}")
            continue
        yield RawSample(str(path), path.read_bytes(), path.suffix.lower().lstrip("."), captions)


def read_parquet(file: Path, skipped: list[str]) -> Iterator[RawSample]:
    """Rows of a parquet file; a row whose picture is not one goes to ``skipped``."""
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(file)
    names = table.schema_arrow.names
    image_column = next((n for n in IMAGE_COLUMNS if n in names), None)
    caption_column = next((n for n in CAPTION_COLUMNS if n in names), None)
    if image_column is None or caption_column is None:
        raise DataError(
            f"{file}: needs one of the columns {IMAGE_COLUMNS} and one of {CAPTION_COLUMNS}, has {names}"
        )
    row = 0
    for batch in table.iter_batches(batch_size=64, columns=[image_column, caption_column]):
        for entry in batch.to_pylist():
            name = f"{file}: row {row}"
            row += 1
            try:
                image = _parquet_image(entry[image_column], file.parent)
                captions = entry[caption_column]
                captions = [captions] if isinstance(captions, str) else captions
                if not captions:
                    raise DataError("no caption")
                with Image.open(io.BytesIO(image)) as opened:
                    suffix = _FORMATS[opened.format or ""]
            except (OSError, KeyError, ValueError, DataError) as error:
                skipped.append(f"{name}: {error}")
                continue
            yield RawSample(name, image, suffix, list(captions))


def _parquet_image(value: Any, folder: Path) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return (folder / value).read_bytes()
    if not isinstance(value, bytes):
        raise DataError(f"the picture is {type(value).__name__}, not bytes or a path")
    return value


def pack(
    samples: Iterable[RawSample],
    store: Store,
    *,
    shard_bytes: int,
    skipped: list[str],
    progress: Callable[[int], None] | None = None,
) -> PackReport:
    """Write ``shard-00000.tar``, ... of about ``shard_bytes`` each; a shard appears whole or not at all."""
    report = PackReport(0, [], skipped)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "shard.tar"
        tar: tarfile.TarFile | None = None
        for sample in samples:
            if tar is None:
                tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - one per shard
            key = f"{report.samples:09d}"
            _add(tar, f"{key}.{sample.suffix}", sample.image)
            if len(sample.captions) == 1:
                _add(tar, f"{key}.txt", sample.captions[0].encode())
            else:
                _add(tar, f"{key}.json", json.dumps({"captions": sample.captions}).encode())
            report.samples += 1
            if progress:
                progress(report.samples)
            if tar.offset >= shard_bytes:
                _finish(tar, path, store, report)
                tar = None
        if tar is not None:
            _finish(tar, path, store, report)
    if not report.samples:
        raise DataError(f"nothing to pack; left out: {report.skipped[:5]}")
    return report


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _finish(tar: tarfile.TarFile, path: Path, store: Store, report: PackReport) -> None:
    tar.close()
    key = f"shard-{len(report.shards):05d}.tar"
    store.write_file(key, path)
    report.shards.append(key)
