"""Index tar shards: several processes read each shard once; an interrupted scan resumes.

A sample is a run of members with the same key: an image and a caption or class (``.txt``, ``.json``, ``.cls``),
as WebDataset, img2dataset and BLIP-3o write them. What cannot be trained on (no image, no caption, a damaged
header, a repeated key, a truncated shard) is listed by name.
"""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from data_pipeline.captions import JSON_FIELDS, json_numbers, parse_captions, parse_label
from data_pipeline.decode import DecodeError, image_size
from data_pipeline.errors import DataError, Reject
from data_pipeline.index import format
from data_pipeline.index.format import BLOCK, COLUMNS, INDEX_KEY, IS_JSON, IS_LABEL, SCORE, Index
from data_pipeline.storage.base import ObjectInfo, Store

PARTIAL_KEY = "index.partial"
"""What a scan has done so far; removed when it is done."""
SAVE_EVERY_S = 120.0
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
TEXT_SUFFIXES = ("txt", "json", "cls")
MAX_SAMPLE_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
"""Longest extended header of a tar that is read: names and attributes."""
PIECE_BYTES = 8 * 2**20
_PIECES = 4
_TAR_DAMAGE = (tarfile.TarError, ArithmeticError, EOFError, LookupError, TypeError, ValueError, RecursionError)
T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int], None]
"""Called with a shard's key, the number of shards that are done, and of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanSettings:
    """How members are read; kept in the index, since training reads them the same way.

    ``text`` is the order in which a sample's text members are preferred, ``caption_fields`` the fields of a
    ``.json`` that hold captions (the first that is there), ``scores`` those whose numbers become columns.
    """

    text: tuple[str, ...] = TEXT_SUFFIXES
    caption_fields: tuple[str, ...] = JSON_FIELDS
    scores: tuple[str, ...] = ()


class ShardFile(io.RawIOBase):
    """A shard as a file for tarfile: fetched in large pieces, of which the last few stay in memory."""

    def __init__(self, store: Store, shard: ObjectInfo) -> None:
        def fetch(number: int) -> bytes:
            start = number * PIECE_BYTES
            return store.read(shard.key, start, min(PIECE_BYTES, shard.size - start), shard.etag)

        self.shard, self._position = shard, 0
        self._piece = functools.lru_cache(_PIECES)(fetch)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._position = max(0, offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """What tarfile reads: headers. Contents are read by :meth:`span`."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self.span(self._position, min(self.shard.size, self._position + size))
        self._position += len(data)
        return data

    def span(self, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end - 1``."""
        if start >= end:
            return b""
        first, last = start // PIECE_BYTES, (end - 1) // PIECE_BYTES
        data = b"".join(self._piece(number) for number in range(first, last + 1))
        return data[start - first * PIECE_BYTES : end - first * PIECE_BYTES]

    def content(self, member: tarfile.TarInfo) -> bytes:
        return self.span(member.offset_data, member.offset_data + member.size)


def scan_shard(store: Store, shard: ObjectInfo, settings: ScanSettings) -> tuple[dict[str, Any], list[str]]:
    """Columns of one shard, and what is wrong with it."""
    rejects: list[Reject] = []
    rows: list[dict[str, Any]] = []
    file = ShardFile(store, shard)
    for key, members, end in shard_samples(file, rejects):
        try:
            rows.append(_row(file, members, end, settings))
        except DecodeError as error:
            rejects.append(Reject(f"{shard.key}: {key}", f"{error.kind}: {error}"))
    names = [*COLUMNS, *(SCORE + name for name in settings.scores)]
    return {name: np.asarray([row[name] for row in rows]) for name in names}, list(map(str, rejects))


def split_name(name: str) -> tuple[str, str]:
    """A tar member's sample key and suffix, as WebDataset splits them: at the first dot behind the folders."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def shard_samples(file: ShardFile, rejects: list[Reject]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], int]]:
    """Key, members by suffix, and end of each sample whose key did not come before in the shard.

    Adds to ``rejects`` what is wrong with the shard: repeated keys, damage, a missing end-of-archive mark.
    """
    shard, keys = file.shard, set[str]()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for key, group in itertools.groupby(_regular_files(tar), lambda member: split_name(member.name)[0]):
                members: dict[str, tarfile.TarInfo] = {}
                for member in group:
                    member_end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member_end > shard.size or member.size < 0:
                        raise tarfile.ReadError(f"{member.name} is cut off")
                    members.setdefault(split_name(member.name)[1], member)
                end = member_end
                if key in keys:
                    rejects.append(Reject(f"{shard.key}: {key}", "duplicate: this key came before"))
                    continue
                keys.add(key)
                yield key, members, end
            stop = tar.offset  # type: ignore[attr-defined]
    except _TAR_DAMAGE as error:
        rejects.append(Reject(shard.key, f"{type(error).__name__}: {error}"))
        return
    mark = file.span(stop, min(shard.size, stop + BLOCK))
    if len(mark) == BLOCK and any(mark):
        # tarfile takes it for the end.
        rejects.append(Reject(shard.key, f"damaged tar header at byte {stop} after {len(keys)} samples"))
    elif len(mark) < BLOCK:
        reason = f"no end-of-archive mark after {len(keys)} samples, the shard may be cut off"
        rejects.append(Reject(shard.key, reason))


def _regular_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        # The list of members that tarfile keeps would grow with the shard.
        tar.members = []  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            yield member


def image_member(members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The sample's image; raises :class:`DecodeError` where it has none."""
    if found := [members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members]:
        return found[0]
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
            lengths = _caption_lengths(content(text), flags, settings)
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
            raise DecodeError("too_large", f"{name} {row[name]} is too large for an index")
    return row


def _caption_lengths(content: bytes, flags: int, settings: ScanSettings) -> list[int]:
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
    workers: int = 1,
    fresh: bool = False,
    progress: Progress | None = None,
) -> tuple[Index, int]:
    """Index of all ``.tar`` objects in the order of their keys, and how many of them an earlier scan had read.

    Unless ``fresh``, unchanged shards of an earlier scan (finished or interrupted) are not read again.
    ``workers`` above 1 are processes. Raises :class:`DataError` if there are no shards.
    """
    shards = [info for info in store.list() if info.key.endswith(".tar")]
    if not shards:
        raise DataError(f"{store.url}: no .tar shards there")
    earlier = {} if fresh else _earlier_scans(store, settings)
    done = {shard: earlier[shard] for shard in shards if shard in earlier}
    reused, last_save = len(done), time.monotonic()
    missing = [shard for shard in shards if shard not in done]
    scan = functools.partial(scan_shard, settings=settings)
    for shard, part in over_processes(scan, missing, store=store, workers=workers):
        done[shard] = part
        if progress:
            progress(shard.key, len(done), len(shards))
        if time.monotonic() - last_save > SAVE_EVERY_S:
            format.write_index(store, _merge(shards, done, settings), PARTIAL_KEY)
            last_save = time.monotonic()
    return _merge(shards, done, settings), reused


def save_index(store: Store, index: Index) -> None:
    """Write the index beside the shards, and remove what an interrupted scan left."""
    format.write_index(store, index)
    store.delete(PARTIAL_KEY)


_Part = tuple[dict[str, Any], list[str]]


def _merge(shards: Sequence[ObjectInfo], done: Mapping[ObjectInfo, _Part], settings: ScanSettings) -> Index:
    """Index of the shards that are done."""
    scanned = [shard for shard in shards if shard in done]
    parts, problems = zip(*(done[shard] for shard in scanned), strict=True)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    header = {"scan": asdict(settings), "problems": list(problems)}
    return format.make_index(scanned, [len(part["start"]) for part in parts], columns, header=header)


def _earlier_scans(store: Store, settings: ScanSettings) -> dict[ObjectInfo, _Part]:
    """Shards that an earlier scan with the same settings has read."""
    parts: dict[ObjectInfo, _Part] = {}
    expected = {key: list(value) for key, value in asdict(settings).items()}
    for key in (INDEX_KEY, PARTIAL_KEY):
        raw = store.read_all(key)
        if raw is None:
            continue
        # A damaged or older index is made anew.
        with contextlib.suppress(DataError):
            index = format.parse_index(np.frombuffer(raw, dtype=np.uint8), key)
            if index.header["scan"] != expected:
                continue
            for i, shard in enumerate(index.shards):
                rows = index.shard_rows(i)
                columns = {n: c[rows.start : rows.stop] for n, c in index.columns.items()}
                parts[shard] = (columns, list(index.header["problems"][i]))
    return parts


def over_processes(
    work: Callable[[Store, T], R], tasks: Iterable[T], *, store: Store, workers: int
) -> Iterator[tuple[T, R]]:
    """``(task, work(store, task))`` for each task, as they complete; one worker is this process.

    ``work`` must be picklable; each process opens the store anew. Raises :class:`DataError` if one was killed.
    """
    if workers <= 1:
        yield from ((task, work(store, task)) for task in tasks)
        return
    remaining, running = iter(tasks), dict[Future[R], T]()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            while True:
                # A short queue: an error should not wait for thousands of submitted tasks.
                for task in itertools.islice(remaining, 2 * workers - len(running)):
                    running[pool.submit(work, store, task)] = task
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError("a worker was killed, perhaps for memory; try fewer --workers") from error
