"""Making an index: every shard is read once, by several processes, and an interrupted scan goes on.

A sample is what neighbouring members with the same stem make: an image and a caption or class (``.txt``,
``.json``, ``.cls``), as WebDataset, img2dataset and BLIP-3o write them. What cannot be trained on (no
image, no caption, a damaged header, a stem that came before, a cut shard) is listed by name.
"""

import contextlib
import io
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import google_crc32c
import numpy as np

from data_pipeline.captions import JSON_FIELDS, json_numbers, parse_captions, parse_label
from data_pipeline.decode import DecodeError, image_size
from data_pipeline.errors import DataError, Reject
from data_pipeline.index.format import (
    BLOCK,
    COLUMNS,
    INDEX_KEY,
    IS_JSON,
    IS_LABEL,
    SCORE,
    Index,
    make_index,
    parse_index,
    write_index,
)
from data_pipeline.process_pool import over_processes
from data_pipeline.storage.base import Access, ObjectInfo, Store

PARTIAL_KEY = "index.partial"
"""What a scan has done so far; removed when it is done."""
SAVE_EVERY_S = 120.0
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
TEXT_SUFFIXES = ("txt", "json", "cls")
MAX_SAMPLE_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
"""Longest extended header of a tar that is read: names and attributes."""
_PIECE = 8 * 2**20
_PIECES = 4
_TAR_DAMAGE = (
    tarfile.TarError, ValueError, OverflowError, EOFError, KeyError, TypeError, IndexError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanSettings:
    """How members are read; kept in the index, since training reads them the same way.

    ``text`` is the order in which a sample's text members are preferred, ``caption_fields`` the fields of a
    ``.json`` that hold captions (the first that is there), ``scores`` those whose numbers become columns.
    """

    text: tuple[str, ...] = TEXT_SUFFIXES
    caption_fields: tuple[str, ...] = JSON_FIELDS
    scores: tuple[str, ...] = ()


@dataclass
class ScanReport:
    """What a scan left out: ``<shard>: <member>: <reason>``; and how much of the work was done before."""

    problems: list[str] = field(default_factory=list)
    reused: int = 0


class ShardFile(io.RawIOBase):
    """A shard as a file: read in large pieces, of which the last few stay in memory."""

    def __init__(self, store: Store, shard: ObjectInfo) -> None:
        self._store, self.shard, self._at = store, shard, 0
        self._pieces: OrderedDict[int, bytes] = OrderedDict()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self.shard.size)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """What tarfile reads: headers. Contents are read by :meth:`span`."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self.span(self._at, min(self.shard.size, self._at + size))
        self._at += len(data)
        return data

    def span(self, first: int, last: int) -> bytes:
        """Bytes ``first`` to ``last - 1``."""
        if first >= last:
            return b""
        numbers = range(first // _PIECE, (last - 1) // _PIECE + 1)
        data = b"".join(self._piece(n) for n in numbers)
        base = numbers.start * _PIECE
        return data[first - base : last - base]

    def _piece(self, number: int) -> bytes:
        if number not in self._pieces:
            start = number * _PIECE
            length = min(_PIECE, self.shard.size - start)
            self._pieces[number] = self._store.read(self.shard.key, start, length, self.shard.etag)
            if len(self._pieces) > _PIECES:
                self._pieces.popitem(last=False)
        return self._pieces[number]


def scan_shard(store: Store, shard: ObjectInfo, settings: ScanSettings) -> tuple[dict[str, Any], list[str]]:
    """Columns of one shard, and what is wrong with it."""
    rejects: list[Reject] = []
    rows: list[dict[str, Any]] = []
    file = ShardFile(store, shard)
    for stem, members, end in shard_samples(file, rejects):
        try:
            rows.append(_row(file, members, end, settings))
        except DecodeError as error:
            rejects.append(Reject(f"{shard.key}: {stem}", f"{error.kind}: {error}"))
    names = [*COLUMNS, *(SCORE + name for name in settings.scores)]
    return {name: np.asarray([row[name] for row in rows]) for name in names}, list(map(str, rejects))


def shard_samples(file: ShardFile, rejects: list[Reject]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], int]]:
    """Stem, members by suffix, and end of each sample whose key did not come before in the shard.

    Adds to ``rejects`` what is wrong with the shard: repeated keys, damage, a missing end-of-archive mark.
    """
    key, stems, last_end = file.shard.key, set[str](), 0
    try:
        for stem, members, end in _runs(file):
            last_end = end
            if stem in stems:
                rejects.append(Reject(f"{key}: {stem}", "duplicate: this key came before"))
                continue
            stems.add(stem)
            yield stem, members, end
    except _TAR_DAMAGE as error:
        rejects.append(Reject(key, f"{type(error).__name__}: {error}"))
    if file.span(last_end, min(file.shard.size, last_end + BLOCK)) != bytes(BLOCK):
        rejects.append(Reject(key, f"no end-of-archive mark after {len(stems)} samples, the shard may be cut off"))


def _runs(file: ShardFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], int]]:
    """Stem, members by suffix, and end of each run of members with one stem."""
    stem: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # The list of members that tarfile keeps would grow with the shard.
            tar.members = []  # type: ignore[attr-defined]
            if not member.isreg() or member.issparse():
                continue
            folder, _, name = member.name.rpartition("/")
            base, _, suffix = name.partition(".")
            key = f"{folder}/{base}" if folder else base
            if key != stem:
                if stem is not None and members:
                    yield stem, members, end
                stem, members = key, {}
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            if end > file.shard.size or member.size < 0:
                raise tarfile.ReadError(f"{member.name} is cut off")
            members.setdefault(suffix.lower(), member)
    if stem is not None and members:
        yield stem, members, end


def image_member(members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The sample's image; raises :class:`DecodeError` where it has none."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in members:
            return members[suffix]
    raise DecodeError("no_image", "no image")


def _row(file: ShardFile, members: dict[str, tarfile.TarInfo], end: int, settings: ScanSettings) -> dict[str, Any]:
    """Columns of one sample; raises :class:`DecodeError` for one that cannot be trained on."""
    image = image_member(members)
    suffixes = [s for s in settings.text if s in members]
    if not suffixes:
        raise DecodeError("no_caption", "no caption")
    start = min(m.offset for m in members.values())
    if end - start > MAX_SAMPLE_BYTES:
        raise DecodeError("too_large", f"{end - start} bytes")
    raw = file.span(start, end)

    def content(member: tarfile.TarInfo) -> bytes:
        return raw[member.offset_data - start : member.offset_data - start + member.size]

    height, width = image_size(content(image))
    for suffix in suffixes:
        text, flags = members[suffix], {"json": IS_JSON, "cls": IS_LABEL}.get(suffix, 0)
        try:
            lengths = _target(content(text), flags, settings)
            break
        except DecodeError:
            # A .json may hold other things than captions; the next member may do.
            if suffix == suffixes[-1]:
                raise
    scores = [float("nan")] * len(settings.scores)
    if settings.scores and "json" in members:
        scores = json_numbers(content(members["json"]), settings.scores)
    row = {
        "start": start // BLOCK,
        "length": (end - start) // BLOCK,
        "image_at": (image.offset_data - start) // BLOCK,
        "text_at": (text.offset_data - start) // BLOCK,
        "image_size": image.size,
        "text_size": text.size,
        "height": height,
        "width": width,
        "caption_chars": min(max(lengths, default=0), np.iinfo(np.uint16).max),
        "num_captions": min(len(lengths), np.iinfo(np.uint8).max),
        "flags": flags,
        "crc32c": google_crc32c.value(raw),
        **{SCORE + name: value for name, value in zip(settings.scores, scores, strict=True)},
    }
    for name, dtype in COLUMNS.items():
        if not 0 <= row[name] <= np.iinfo(dtype).max:
            raise DecodeError("too_large", f"{name} {row[name]} is beyond what an index holds")
    return row


def _target(content: bytes, flags: int, settings: ScanSettings) -> list[int]:
    """Lengths of the captions in characters, none for a label; raises :class:`DecodeError`."""
    if flags & IS_LABEL:
        parse_label(content)
        return []
    captions = parse_captions(content, is_json=bool(flags & IS_JSON), fields=settings.caption_fields)
    return [len(text) for text in captions.texts]


def build_index(
    store: Store,
    settings: ScanSettings = ScanSettings(),
    *,
    access: Access = Access(),
    workers: int = 1,
    fresh: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Index, ScanReport]:
    """Scan all ``.tar`` objects below the store's URL, in the order of their keys.

    Shards that an earlier scan (finished or interrupted) has read and that have not changed are not read
    again, unless ``fresh``. ``workers`` above 1 are processes. Raises :class:`DataError` where there is none.
    """
    shards = tuple(info for info in store.list() if info.key.endswith(".tar"))
    if not shards:
        raise DataError(f"{store.url}: no .tar shards there")
    earlier = {} if fresh else _earlier(store, settings)
    done = {i: earlier[shard] for i, shard in enumerate(shards) if shard in earlier}
    report = ScanReport(reused=len(done))
    saved = time.monotonic()
    missing = [i for i in range(len(shards)) if i not in done]
    numbers = {shards[i]: i for i in missing}
    tasks = [(shards[i], settings) for i in missing]
    for (shard, _), result in over_processes(_scan_task, tasks, store=store, access=access, workers=workers):
        number = numbers[shard]
        done[number] = result
        if progress:
            progress(shards[number].key, len(done), len(shards))
        if time.monotonic() - saved > SAVE_EVERY_S:
            write_index(store, _merge(shards, done, settings), PARTIAL_KEY)
            saved = time.monotonic()
    index = _merge(shards, done, settings)
    report.problems = [p for entry in index.header["problems"] for p in entry]
    return index, report


def save_index(store: Store, index: Index) -> None:
    """Write the index beside the shards, and remove what an interrupted scan left."""
    write_index(store, index, INDEX_KEY)
    store.delete(PARTIAL_KEY)


_Part = tuple[dict[str, Any], list[str]]


def _merge(shards: Sequence[ObjectInfo], done: dict[int, _Part], settings: ScanSettings) -> Index:
    numbers = sorted(done)
    names = [*COLUMNS, *(SCORE + name for name in settings.scores)]
    counts = [len(done[n][0]["start"]) for n in numbers]
    columns = {name: np.concatenate([done[n][0][name] for n in numbers] or [np.zeros(0)]) for name in names}
    header = {"scan": asdict(settings), "problems": [done[n][1] for n in numbers]}
    return make_index([shards[n] for n in numbers], counts, columns, header=header)


def _earlier(store: Store, settings: ScanSettings) -> dict[ObjectInfo, _Part]:
    """Parts of an earlier scan with the same settings."""
    parts: dict[ObjectInfo, _Part] = {}
    expected = {key: list(value) for key, value in asdict(settings).items()}
    for key in (INDEX_KEY, PARTIAL_KEY):
        raw = store.read_all(key)
        if raw is None:
            continue
        # A damaged or older index is made anew.
        with contextlib.suppress(DataError):
            index = parse_index(np.frombuffer(raw, dtype=np.uint8), key)
            if index.header["scan"] != expected:
                continue
            for i, shard in enumerate(index.shards):
                rows = index.shard_rows(i)
                columns = {n: c[rows.start : rows.stop] for n, c in index.columns.items()}
                parts[shard] = (columns, list(index.header["problems"][i]))
    return parts


def _scan_task(store: Store, task: tuple[ObjectInfo, ScanSettings]) -> _Part:
    return scan_shard(store, *task)
