"""Small data sets in every form that ``pack`` and ``index`` take."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from data_pipeline.decode import DecodeError
from data_pipeline.errors import Reject
from data_pipeline.index.build import ScanSettings, build_index, save_index
from data_pipeline.pack.readers import PackedSample, read_source
from data_pipeline.storage.base import open_store

LONG = "a very long caption " * 5000


def image_bytes(seed: int, suffix: str = "png", size: tuple[int, int] = (40, 48)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


def tar_of(members: dict[str, bytes], *more: dict[str, bytes], tar_format: int = tarfile.DEFAULT_FORMAT) -> bytes:
    """A tar of members in order; ``more`` may repeat names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in (pair for each in (members, *more) for pair in each.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """What the webdataset package reads, keys and origins left out."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    return [{k: v for k, v in sample.items() if not k.startswith("__")} for sample in read]


def read_all(source: Path) -> tuple[list[PackedSample], list[Reject]]:
    rejects: list[Reject] = []
    return list(read_source(str(source), rejects)), rejects


def files_form(folder: Path, count: int = 4) -> Path:
    """As img2dataset's ``files`` writes: images with .txt and .json, parquet and stats beside the folders."""
    (folder / "00000").mkdir(parents=True)
    for i in range(count):
        path = folder / "00000" / f"{i:09d}.jpg"
        path.write_bytes(image_bytes(i, "jpg"))
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
                    "jpg": image_bytes(i, "jpg"),
                    "txt": f"caption {i}",
                    "json": img2dataset_entry(i),
                }
            )
    (folder / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"key": ["000000000"], "caption": ["caption 0"]}), folder / "00000.parquet")
    return folder


def parquet_form(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    rows = [img2dataset_entry(i) | {"jpg": image_bytes(i, "jpg")} for i in range(count)]
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


IMAGE = image_bytes(0)


def kind_of(action: Callable[[], object]) -> str | None:
    """Kind of the fault, None where there is none; anything but a DecodeError escapes."""
    try:
        action()
    except DecodeError as error:
        return error.kind
    return None


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
