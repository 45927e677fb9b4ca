"""The index of a data set: where each sample lies in its shard, and what is known of it.

Made once (``deco-data index``, :mod:`data_pipeline.index.build`) and kept beside the shards as
``index.safetensors``: columns of NumPy numbers, 34 bytes a sample, and a JSON header. It is mapped into
memory, so that the processes of a node share one copy.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.storage.base import ObjectInfo, Store
from data_pipeline.storage.files import atomic_path
from data_pipeline.storage.safetensors import encode_header, views

INDEX_KEY = "index.safetensors"
VERSION = 2
BLOCK = 512
"""Bytes of a tar block; offsets are counted in them."""
COLUMNS: dict[str, Any] = {
    # Blocks: where the sample starts in its shard, how long it is, where its members lie in it.
    "start": np.uint32,
    "length": np.uint32,
    "image_at": np.uint16,
    "text_at": np.uint32,
    # Bytes.
    "image_size": np.uint32,
    "text_size": np.uint32,
    # Pixels as seen (after EXIF orientation).
    "height": np.uint16,
    "width": np.uint16,
    # Characters of the longest caption, and how many there are; both stop at the type's end.
    "caption_chars": np.uint16,
    "num_captions": np.uint8,
    "flags": np.uint8,
    # Of the sample's bytes, start to start + length.
    "crc32c": np.uint32,
}
IS_JSON, IS_LABEL = 1, 2
"""Flags: what the text member is; neither means ``.txt``."""
SCORE = "score."
"""Prefix of columns with numbers from the samples' ``.json``."""
_TYPES = {"F32": np.float32, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8}
_PIECE = 32 * 2**20
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Location:
    """Where a sample lies; offsets in bytes, ``image`` and ``text`` within the sample."""

    shard: int
    start: int
    end: int
    image: slice
    text: slice
    crc32c: int
    is_json: bool
    is_label: bool


@dataclass(frozen=True)
class Index:
    """Columns of equal length, one entry per row, and the shards they point into.

    Samples are numbered 0 to ``len(index) - 1``; where ``rows`` is given, only those rows are samples.
    ``ends[i]`` is the number of rows in shards 0 to i. ``digest`` identifies the content and the selection;
    the order of samples depends on it; ``whole_digest`` is that of all rows. ``header`` keeps how the index was
    made and what was left out.
    """

    shards: tuple[ObjectInfo, ...]
    ends: np.ndarray[Any, np.dtype[np.int64]]
    columns: Mapping[str, np.ndarray[Any, Any]]
    digest: str
    header: Mapping[str, Any] = field(default_factory=dict)
    rows: np.ndarray[Any, np.dtype[np.uint32]] | None = None
    whole_digest: str = ""

    def __len__(self) -> int:
        return len(self.columns["start"]) if self.rows is None else len(self.rows)

    @property
    def score_names(self) -> list[str]:
        return [name.removeprefix(SCORE) for name in self.columns if name.startswith(SCORE)]

    @property
    def problems(self) -> list[str]:
        """What the scan could not use, as ``<shard>: <key>: <reason>``."""
        return [problem for shard in self.header.get("problems", ()) for problem in shard]

    def row(self, sample: int) -> int:
        return sample if self.rows is None else int(self.rows[sample])

    def sample_ends(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Number of samples in shards 0 to i."""
        return self.ends if self.rows is None else np.searchsorted(self.rows, self.ends).astype(np.int64)

    def shard_rows(self, shard: int) -> range:
        """Rows of the ``shard``-th shard."""
        return range(int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard]))

    def column(self, name: str, first: int, last: int) -> np.ndarray[Any, Any]:
        """Values of samples ``first`` to ``last - 1``."""
        samples = slice(first, last)
        return self.columns[name][samples if self.rows is None else self.rows[samples]]

    def locate(self, sample: int) -> Location:
        row, columns = self.row(sample), self.columns
        start = BLOCK * int(columns["start"][row])
        image, text = (BLOCK * int(columns[name][row]) for name in ("image_at", "text_at"))
        flags = int(columns["flags"][row])
        return Location(
            shard=int(np.searchsorted(self.ends, row, side="right")),
            start=start,
            end=start + BLOCK * int(columns["length"][row]),
            image=slice(image, image + int(columns["image_size"][row])),
            text=slice(text, text + int(columns["text_size"][row])),
            crc32c=int(columns["crc32c"][row]),
            is_json=bool(flags & IS_JSON),
            is_label=bool(flags & IS_LABEL),
        )

    def only(self, rows: np.ndarray[Any, Any]) -> "Index":
        """The same index with some rows (ascending) as its samples, under a digest of its own."""
        rows = np.ascontiguousarray(rows, dtype=np.uint32)
        if self.rows is None and len(rows) == len(self):
            return self
        digest = hashlib.sha256(self.digest.encode())
        digest.update(_bytes(rows))
        return dataclasses.replace(self, digest=digest.hexdigest()[:16], rows=rows)


def make_index(
    shards: Sequence[ObjectInfo],
    counts: Sequence[int],
    columns: Mapping[str, Any],
    *,
    header: Mapping[str, Any] | None = None,
) -> Index:
    """Index of shards with ``counts`` rows each, with the digest of its content."""
    types = {n: COLUMNS.get(n, np.float32) for n in columns}
    arrays = {n: np.ascontiguousarray(columns[n], dtype=t) for n, t in types.items()}
    hasher = hashlib.sha256(
        json.dumps([[s.key, s.size, int(c)] for s, c in zip(shards, counts, strict=True)]).encode()
    )
    for name in sorted(arrays):
        hasher.update(name.encode())
        hasher.update(_bytes(arrays[name]))
    ends = np.cumsum(np.asarray(counts, dtype=np.int64))
    digest = hasher.hexdigest()[:16]
    return Index(tuple(shards), ends, arrays, digest, dict(header or {}), whole_digest=digest)


def write_index(store: Store, index: Index, key: str = INDEX_KEY) -> None:
    """Write an index beside the shards."""
    if index.rows is not None:
        raise ValueError("a selection is made when data are read; the whole index is saved")
    header = {
        **index.header,
        "version": VERSION,
        "digest": index.digest,
        "shards": [[s.key, s.size, s.etag] for s in index.shards],
        "ends": index.ends.tolist(),
    }
    store.write(key, pack_columns(index.columns, header))


def load_index(store: Store, *, cache: Path | None = None) -> Index:
    """Read the index; raises :class:`DataError` where it is missing, damaged or empty.

    ``cache`` is a folder for a copy of a remote index, which the processes of a node then share.
    """
    where = f"{store.url}/{INDEX_KEY}"
    for attempt in range(_ATTEMPTS):
        raw = _raw(store, cache, fresh=attempt > 0)
        if raw is None:
            count = sum(info.key.endswith(".tar") for info in store.list())
            what = f"{count} shards but no index" if count else "no shards and no index"
            raise DataError(f"{store.url}: {what}; pack data there, then run: deco-data index {store.url}")
        try:
            index = parse_index(raw, where)
            break
        except DataError:
            # It may have been damaged on its way, or in the cache.
            if store.local_path(INDEX_KEY) is not None or attempt == _ATTEMPTS - 1:
                raise
    if not len(index):
        raise DataError(f"{store.url}: the index has no usable sample")
    return index


def read_sample(store: Store, index: Index, location: Location) -> bytes:
    """A sample's tar members; raises :class:`DataError` where they differ from the index."""
    shard = index.shards[location.shard]
    raw = store.read(shard.key, location.start, location.end - location.start, shard.etag)
    if google_crc32c.value(raw) != location.crc32c:
        where = f"{store.url}/{shard.key}: bytes {location.start}-{location.end}"
        raise DataError(f"{where} differ from the index")
    return raw


def parse_index(raw: Bytes, where: str) -> Index:
    """Index from the bytes of its file, sharing their memory; raises :class:`DataError` for damage."""
    columns, header = unpack_columns(raw, where, COLUMNS, VERSION)
    try:
        ends = np.asarray(header["ends"], dtype=np.int64)
        shards = tuple(ObjectInfo(*entry) for entry in header["shards"])
        rows = len(columns["start"])
        if len(ends) != len(shards) or (int(ends[-1]) if len(ends) else 0) != rows:
            raise ValueError(f"{len(ends)} ends for {len(shards)} shards and {rows} rows")
        digest = str(header["digest"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{where} is damaged ({type(error).__name__}: {error}); run deco-data index") from error
    rest = {n: v for n, v in header.items() if n not in ("shards", "ends", "digest", "version")}
    return Index(shards, ends, columns, digest, rest, whole_digest=digest)


def pack_columns(columns: Mapping[str, np.ndarray[Any, Any]], header: Mapping[str, Any]) -> bytes:
    """A safetensors file of columns and a JSON header, with checksums of each."""
    checked = {**header, "crc32c": {name: google_crc32c.value(_bytes(c)) for name, c in columns.items()}}
    text = json.dumps(checked)
    metadata = {"header": text, "crc32c": str(google_crc32c.value(text.encode()))}
    # Wide columns first, so that each lies aligned when mapped; among equals as the safetensors library sorts.
    arrays = dict(
        sorted(columns.items(), key=lambda item: (-item[1].itemsize, item[1].dtype.kind != "f", item[0]))
    )
    names = {np.dtype(dtype): name for name, dtype in _TYPES.items()}
    tensors = {n: (names[column.dtype], column.shape) for n, column in arrays.items()}
    return b"".join([encode_header(tensors, metadata), *(_bytes(column) for column in arrays.values())])


def unpack_columns(
    raw: Bytes, where: str, types: Mapping[str, Any], version: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns (views of ``raw``) and header of such a file; raises :class:`DataError` for any damage."""
    try:
        arrays, metadata = views(raw, _TYPES)
        if str(google_crc32c.value(metadata["header"].encode())) != metadata["crc32c"]:
            raise ValueError("wrong checksum of the header")
        header = json.loads(metadata["header"])
        if header["version"] != version:
            raise DataError(f"{where} has version {header['version']}, expected {version}; run deco-data index")
        if arrays.keys() != header["crc32c"].keys():
            raise ValueError("the columns are not those of the header")
        columns = {n: arrays[n] for n in (*types, *(n for n in arrays if n.startswith(SCORE)))}
        for name, column in columns.items():
            if name in types and column.dtype != types[name]:
                raise ValueError(f"column {name} has type {column.dtype}")
            if google_crc32c.value(_bytes(column)) != header["crc32c"][name]:
                raise ValueError(f"wrong checksum of column {name}")
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError("columns of different lengths")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is damaged ({type(error).__name__}: {error}); run deco-data index") from error
    return columns, header


def _raw(store: Store, cache: Path | None, *, fresh: bool) -> Bytes | None:
    """The file's bytes, mapped where they are on a local disk."""
    local = store.local_path(INDEX_KEY)
    if local is not None:
        return np.memmap(local, dtype=np.uint8, mode="r") if local.exists() and local.stat().st_size else None
    info = store.info(INDEX_KEY)
    if info is None:
        return None
    if cache is None:
        return np.frombuffer(store.read(INDEX_KEY, 0, info.size, info.etag), dtype=np.uint8)
    name = hashlib.sha256(f"{store.url} {info.etag} {info.size}".encode()).hexdigest()[:32]
    path = cache / f"index-{name}.safetensors"
    if fresh or not path.exists() or path.stat().st_size != info.size:
        with atomic_path(path, durable=False, shared=True) as partial, partial.open("wb") as file:
            for offset in range(0, info.size, _PIECE):
                length = min(_PIECE, info.size - offset)
                file.write(store.read(INDEX_KEY, offset, length, info.etag))
    return np.memmap(path, dtype=np.uint8, mode="r")


def _bytes(column: np.ndarray[Any, Any]) -> Any:
    """A read-only view for the checksum, without a copy: a column may be gigabytes."""
    view = np.ascontiguousarray(column).view(np.uint8)
    view.flags.writeable = False
    return view
