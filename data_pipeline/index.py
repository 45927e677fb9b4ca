"""The index of a data set: where each sample lies in its shard, and what is known of it.

Made once (``deco-data index``), kept beside the shards as ``index.npz`` (NumPy arrays and a JSON header,
read without pickle). A sample is an image member and a caption or class member (``.txt``, ``.json``, ``.cls``)
with the same stem, one after the other; anything else is listed by name and never trained on.
"""

import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.store import ObjectInfo, Store

INDEX_KEY = "index.npz"
VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json", "cls")
_COLUMNS = {
    "shard": np.uint32,
    "start": np.uint64,
    "end": np.uint64,
    "image_offset": np.uint64,
    "image_size": np.uint32,
    "text_offset": np.uint64,
    "text_size": np.uint32,
    "is_json": np.bool_,
    "height": np.uint32,
    "width": np.uint32,
    "crc32c": np.uint32,
}
_TAR_BLOCK = 512
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises for an archive that is not whole."""


@dataclass(frozen=True, slots=True)
class Index:
    """Columns of equal length, one entry per sample, and the shards they point into.

    ``digest`` identifies the content; the order of samples depends on it.
    """

    shards: tuple[ObjectInfo, ...]
    columns: dict[str, "np.ndarray[Any, Any]"]
    digest: str = field(default="")

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def select(self, min_side: int) -> "Index":
        """Only the samples whose shorter side has at least ``min_side`` pixels; a digest of its own."""
        keep = np.minimum(self.columns["height"], self.columns["width"]) >= min_side
        if keep.all():
            return self
        return make_index(self.shards, {n: c[keep] for n, c in self.columns.items()})


def make_index(shards: tuple[ObjectInfo, ...], columns: dict[str, Any]) -> Index:
    """Index with the digest of its content."""
    columns = {n: np.ascontiguousarray(columns[n], dtype=t) for n, t in _COLUMNS.items()}
    hasher = hashlib.sha256(json.dumps([[s.key, s.size] for s in shards]).encode())
    for column in columns.values():
        hasher.update(column.tobytes())
    return Index(shards, columns, hasher.hexdigest()[:16])


@dataclass
class ScanReport:
    """What a scan left out: ``<shard>: <member>: <reason>``."""

    problems: list[str] = field(default_factory=list)


def scan_shard(store: Store, shard: ObjectInfo, number: int, report: ScanReport) -> dict[str, Any]:
    """Columns of one shard; problems go to the report with the shard's key and the member's name."""
    raw = store.read(shard.key, 0, shard.size, shard.etag) if shard.size else b""
    rows: list[dict[str, Any]] = []
    pending: dict[str, tarfile.TarInfo] = {}
    stem = ""

    def close(end: int) -> None:
        if not pending:
            return
        image = next((pending[s] for s in IMAGE_SUFFIXES if s in pending), None)
        text = next((pending[s] for s in TEXT_SUFFIXES if s in pending), None)
        if image is None or text is None:
            missing = "image" if image is None else "caption"
            report.problems.append(f"{shard.key}: {stem}: no {missing}")
            return
        try:
            with Image.open(io.BytesIO(raw[image.offset_data : image.offset_data + image.size])) as opened:
                width, height = opened.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            report.problems.append(f"{shard.key}: {image.name}: not an image ({error})")
            return
        start = min(m.offset for m in pending.values())
        rows.append(
            {
                "shard": number,
                "start": start,
                "end": end,
                "image_offset": image.offset_data,
                "image_size": image.size,
                "text_offset": text.offset_data,
                "text_size": text.size,
                "is_json": text.name.endswith(".json"),
                "height": height,
                "width": width,
                "crc32c": google_crc32c.value(raw[start:end]),
            }
        )

    last_end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                base, _, suffix = name.partition(".")
                if f"{folder}/{base}" != stem:
                    close(last_end)
                    pending, stem = {}, f"{folder}/{base}"
                pending[suffix.lower()] = member
                padded = -(-member.size // _TAR_BLOCK) * _TAR_BLOCK
                last_end = member.offset_data + padded
                if last_end > len(raw):
                    raise tarfile.ReadError(f"{member.name} is cut off")
        close(last_end)
    except tarfile.TarError as error:
        report.problems.append(f"{shard.key}: {error}")
        if pending and last_end <= len(raw):
            close(last_end)
    if raw[last_end : last_end + _TAR_BLOCK] != bytes(_TAR_BLOCK):
        report.problems.append(f"{shard.key}: no end-of-archive mark, the shard may be cut off")
    return {name: [row[name] for row in rows] for name in _COLUMNS}


def build_index(
    store: Store, *, progress: Callable[[str, int, int], None] | None = None
) -> tuple[Index, ScanReport]:
    """Scan all ``.tar`` objects below the store's URL, in the order of their keys.

    Raises :class:`DataError` where there is none.
    """
    shards = tuple(info for info in store.list() if info.key.endswith(".tar"))
    if not shards:
        raise DataError(f"{store.url}: no .tar shards there")
    report = ScanReport()
    parts = []
    for number, shard in enumerate(shards):
        parts.append(scan_shard(store, shard, number, report))
        if progress:
            progress(shard.key, number + 1, len(shards))
    columns = {name: np.concatenate([np.asarray(p[name]) for p in parts]) for name in _COLUMNS}
    return make_index(shards, columns), report


def save_index(store: Store, index: Index) -> None:
    """Write ``index.npz`` beside the shards."""
    header = {
        "version": VERSION,
        "digest": index.digest,
        "shards": [[s.key, s.size, s.etag] for s in index.shards],
    }
    buffer = io.BytesIO()
    encoded = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez_compressed(buffer, header=encoded, **index.columns)  # type: ignore[arg-type]
    data = buffer.getvalue()
    # A zip archive may be followed by other bytes; these cover what the archive's own sums do not.
    store.write(INDEX_KEY, data + google_crc32c.value(data).to_bytes(4, "big"))


def load_index(store: Store) -> Index:
    """Read ``index.npz``; raises :class:`DataError` where it is missing, damaged or empty."""
    raw = store.read_all(INDEX_KEY)
    if raw is None:
        found = sum(info.key.endswith(".tar") for info in store.list())
        what = f"{found} shards but no index" if found else "no shards and no index: nothing is here"
        raise DataError(f"{store.url}: {what}; pack data there, then run: deco-data index {store.url}")
    data, checksum = raw[:-4], int.from_bytes(raw[-4:], "big")
    if google_crc32c.value(data) != checksum:
        raise DataError(f"{store.url}/{INDEX_KEY} is damaged (wrong checksum); index again")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            columns = {name: arrays[name] for name in _COLUMNS}
        if header["version"] != VERSION:
            raise DataError(f"{store.url}: index version {header['version']}, wanted {VERSION}")
        index = make_index(tuple(ObjectInfo(*entry) for entry in header["shards"]), columns)
    except _DAMAGE as error:
        raise DataError(f"{store.url}/{INDEX_KEY} is damaged ({error}); index again") from error
    if index.digest != header["digest"]:
        raise DataError(f"{store.url}/{INDEX_KEY} is damaged (wrong digest); index again")
    if not len(index):
        raise DataError(f"{store.url}: the index holds no usable sample")
    return index
